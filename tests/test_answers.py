"""The pool of processes that compare answers, and what never reaches it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from l2t_trl import answer_pool, answers
from l2t_trl.answer_pool import AnswerPool


HANGING = {"given": "9^{9^{9^{9}}}", "gold": "7^{8^{9}}"}
HALF = {"given": "\\frac{1}{2}", "gold": "0.5"}
THIRD = {"given": "\\frac{1}{3}", "gold": "0.5"}
ROOT = Path(__file__).parents[1]


@pytest.fixture
def pool():
    """A pool of its own, with less patience than the shared one."""
    pool = AnswerPool(2, time_limit_s=3)
    yield pool
    pool.close()


@pytest.fixture
def own_shared_pool(monkeypatch, pool):
    monkeypatch.setattr(answer_pool, "_shared", pool)
    return pool


def run_script(text: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=300, **options
    )


# Without the pool


@pytest.mark.parametrize(
    ("given", "golds", "verdict"),
    [
        ("72", "72", True),
        ("72", "73", False),
        ("1,200", "1200", True),
        ("025", "25", True),
        ("27.0", "27", True),
        ("\\$18", "18", True),
        ("a + b", "a+b", True),
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("4:30 \\text{ p.m.}", "\\text{4:30 p.m.}", True),
        ("15 cm^2", "15\\mbox{ cm}^2", True),
        ("Evelyn.", "\\text{Evelyn}", True),
        ("4:30 \\text{ a.m.}", "\\text{4:30 p.m.}", None),
        ("81", ["080", "081"], True),
        ("82", ["080", "081"], False),
        ("5", "", None),
        ("5", [], None),
        ("9" * 5000, "5" * 5000, None),
    ],
)
def test_texts_and_whole_numbers_need_no_process(own_shared_pool, monkeypatch, given, golds, verdict):
    # What only math-verify could tell stays open.
    monkeypatch.setattr(own_shared_pool, "ask", lambda requests: [None] * len(requests))
    assert answers.judge_texts([f"\\boxed{{{given}}}"], [golds]) == [verdict]


def test_completions_without_an_answer_need_no_process(own_shared_pool):
    assert answers.judge_texts(["no box", "\\boxed{}", ""], ["\\sqrt{2}"] * 3) == [False] * 3
    assert own_shared_pool.num_workers == 0


def test_equal_questions_are_asked_once(own_shared_pool, monkeypatch):
    asked = []
    monkeypatch.setattr(own_shared_pool, "ask", lambda requests: asked.extend(requests) or [True] * len(requests))
    assert answers.judge_texts(["\\boxed{\\frac12}"] * 8, ["0.5"] * 8) == [True] * 8
    assert asked == [{"given": "\\frac12", "gold": "0.5"}]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [([True, False], True), ([False, None], False), ([None, None], None), ([None, True], True)],
)
def test_one_of_several_golds_is_enough(own_shared_pool, monkeypatch, found, verdict):
    monkeypatch.setattr(own_shared_pool, "ask", lambda requests: found)
    assert answers.judge_texts(["\\boxed{c}"], [["a", "b"]]) == [verdict]


def test_answer_key_is_shared_by_equal_notations():
    assert answers.answer_key("1,200") == answers.answer_key("01200") == answers.answer_key("1200.0") == "1200"
    assert answers.answer_key("\\dfrac{x}{2}") == answers.answer_key("\\frac{x} {2}") != answers.answer_key("x/2")


NOTATIONS = {
    "1/2": ["\\frac{1}{2}", "\\dfrac12", "\\tfrac{2}{4}", "0.5", ".50", "$0.5$", "\\$0.50", "+1/2", "50\\%", "50%"],
    "-1/2": ["-\\frac{1}{2}", "\\frac{-1}{2}", "-0.5"],
    "2": ["4/2", "2.", "\\frac{4}{2}", "200\\%"],
    "2469/2": ["1,234.5", "1234.50"],
    "(1/2,3]": ["\\left(0.5, 3.0\\right]", "(\\frac{1}{2}, 3]"],
    "\\{1/2,x\\}": ["\\{ 0.5, x \\}"],
    # To six decimals, or as many digits of what is smaller.
    "333333/1000000": ["1/3", "\\frac13", "0.333333", "0.33333333"],
    "1/10000000": ["0.0000001", "0.00001\\%"],
    # No numbers: as they are written.
    "1/0": ["1 / 0"],
    "\\frac{\\sqrt{3}}{2}": ["\\dfrac{\\sqrt{3}}{2}"],
    "10/2/5": ["10/2/5"],
    "1/": ["1/"],
    "": ["$$"],
    "-": ["-"],
}


@pytest.mark.parametrize("key", NOTATIONS)
def test_answer_key_of_numbers_by_hand(key):
    assert [answers.answer_key(answer) for answer in [key, *NOTATIONS[key]]] == [key] * (len(NOTATIONS[key]) + 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1/3", "0.33333"), ("0.0000001", "0.0000002"), ("(1,2)", "12"), ("(1,2)", "[1,2]"), ("0,5", "0.5"), ("5", "5%")],
)
def test_answer_key_tells_values_apart(one, other):
    assert answers.answer_key(one) != answers.answer_key(other)


def test_answer_key_of_hostile_text_is_quick_and_harmless():
    for answer in ("1" * 10**5 + ".5", "0." + "0" * 10**5 + "1", "1," * 10**5, "(" * 10**5, "\\frac{" * 10**4):
        assert isinstance(answers.answer_key(answer), str)


def test_answer_key_agrees_with_math_verify():
    from l2t_trl.answer_worker import compare

    written = ["1/2", "\\frac{1}{2}", "0.5", "50\\%", "1/3", "0.333333", "0.3333", "-\\frac{3}{4}", "-0.75", "1.5"]
    for one in written:
        for other in written:
            is_equal = answers.answer_key(one) == answers.answer_key(other)
            assert compare(one, other) is is_equal, (one, other)


# The pool


def test_verdicts_come_in_order(pool):
    unread = {"given": "5", "gold": "\\text{}"}
    assert pool.ask([HALF, THIRD, unread, HALF] * 5) == [True, False, None, True] * 5
    assert pool.ask([{"gold": "\\sqrt{2}"}, {"gold": "\\text{}"}]) == [True, False]
    assert pool.ask([]) == []


def test_workers_start_when_needed_and_stay(pool):
    assert pool.num_workers == 0
    pool.ask([HALF])
    assert pool.num_workers == 1
    process = pool._workers[0].process
    pool.ask([HALF, THIRD, HALF])
    assert pool.num_workers == 2 and pool._workers[0].process is process


def test_hanging_answer_is_wrong_and_counted_and_others_are_judged(pool):
    assert pool.ask([HALF, HANGING, THIRD, HALF]) == [True, False, False, True]
    assert (pool.timed_out, pool.crashed) == (1, 0)
    assert pool.ask([HALF]) == [True]


def test_answer_that_kills_its_worker_is_wrong_and_counted(pool):
    assert pool.ask([HALF, {"nothing": "known"}, HALF]) == [True, False, True]
    assert (pool.timed_out, pool.crashed) == (0, 1)


def test_worker_that_was_killed_while_idle_is_replaced(pool):
    pool.ask([HALF])
    pool._workers[0].process.kill()
    pool._workers[0].process.wait()
    assert pool.ask([HALF, THIRD]) == [True, False]
    assert pool.crashed == 0


def test_closed_pool_starts_again(pool):
    pool.ask([HALF])
    process = pool._workers[0].process
    pool.close()
    assert process.returncode is not None and pool.num_workers == 0
    assert pool.ask([THIRD]) == [False]


def test_interruption_leaves_no_stale_verdict(pool, monkeypatch):
    pool.ask([HALF])

    def interrupted(verdicts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.ask([HALF])
    # The worker that still has the request would answer the next one with its verdict.
    assert pool.num_workers == 0
    assert pool.ask([THIRD]) == [False]


def test_threads_share_the_pool(pool):
    found = {}

    def ask(number):
        found[number] = pool.ask([HALF if number % 2 else THIRD] * 5)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [bool(number % 2)] * 5 for number in range(6)}


def test_worker_that_cannot_start_is_an_error(pool, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended as it started"):
        pool.ask([HALF])
    assert pool.num_workers == 0


@pytest.mark.parametrize(("trainers", "size"), [("1", 4), ("2", 4), ("4", 2), ("8", 1), ("16", 1)])
def test_trainers_of_a_machine_share_its_cores(monkeypatch, trainers, size):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", trainers)
    assert answer_pool.pool_size() == size


# Processes


def test_worker_imports_nothing_heavy():
    code = (
        "import sys, math_verify, l2t_trl.answer_worker as worker\n"
        "assert worker.compare('\\\\frac{1}{2}', '0.5') is True\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    assert run_script(code).stdout == "[]\n"


def test_script_without_main_guard_runs_once_and_ends():
    code = (
        "print('started')\n"
        "from l2t_trl.rewards import accuracy\n"
        "print(accuracy(['\\\\boxed{\\\\frac{1}{2}}'], ['0.5']))\n"
    )
    result = run_script(code)
    assert (result.returncode, result.stdout) == (0, "started\n[1.0]\n"), result.stderr


def test_files_of_the_working_folder_are_not_imported_by_workers(pool, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert pool.ask([HALF]) == [True]


def test_process_ends_at_once_while_an_answer_hangs_in_a_thread():
    code = f"""
import threading, time
from l2t_trl.answer_pool import shared_pool
pool = shared_pool()
pool.time_limit_s = 1000
pool.ask([{HALF!r}])
print(pool._workers[0].process.pid)
threading.Thread(target=pool.ask, args=([{HANGING!r}],), daemon=True).start()
while not any(worker.job is not None for worker in pool._workers):
    time.sleep(0.01)
"""
    result = run_script(code)
    assert result.returncode == 0, result.stderr
    assert not Path(f"/proc/{int(result.stdout)}").exists()


def test_forked_child_has_workers_of_its_own():
    code = f"""
import os
from l2t_trl.answer_pool import shared_pool
parent = shared_pool()
assert parent.ask([{HALF!r}]) == [True]
child = os.fork()
if child == 0:
    assert shared_pool() is not parent and shared_pool().num_workers == 0
    code = 0 if shared_pool().ask([{THIRD!r}]) == [False] else 1
    shared_pool().close()
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert parent.ask([{THIRD!r}, {HALF!r}]) == [False, True]
print("fine")
"""
    result = run_script(code)
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr


def test_worker_ends_with_its_input_and_ends_a_comparison_that_nobody_waits_for():
    command = [sys.executable, "-P", "-m", "l2t_trl.answer_worker", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, input="", env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, '"ready"\n')
    request = '{"given": "9^{9^{9^{9}}}", "gold": "7^{8^{9}}"}\n'
    result = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGALRM
