"""The sandbox against programs that mean harm: it stays alive, judges right, and nothing is left behind."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from l2t_trl.errors import UserError
from l2t_trl.evaluation import sandbox as sandbox_module
from l2t_trl.evaluation.sandbox import Job, Limits, Sandbox, Verdict


LIMITS = Limits(memory_bytes=256 << 20, cpu_s=5)
TESTS = "assert double(2) == 4\nassert double(-1) == -2\n"
RIGHT = "def double(x):\n    return 2 * x\n"
SECRET = "the secret of the home folder"


def _is_permitted(isolation: str) -> bool:
    """Whether the system permits it, asked without the code under test: what is broken shall fail, not be skipped."""
    if sys.platform != "linux" or isolation == "seccomp":
        return sys.platform == "linux" and platform.machine() == "x86_64"
    command = ["unshare", "--user", "--mount", "--net", "--ipc", "--pid", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def _sandbox(isolation, **kwargs):
    if not _is_permitted(isolation):
        pytest.skip(f"this system permits no {isolation}")
    return Sandbox(workers=1, limits=LIMITS, isolation=isolation, **kwargs)


@pytest.fixture(scope="module", params=["namespaces", "seccomp"])
def sandbox(request):
    with _sandbox(request.param) as made:
        yield made


# Long, so that none but what hangs runs out of it on a busy machine.
def _judge(sandbox, program, tests=TESTS, time_s=30.0, **kwargs):
    return sandbox.run(Job(program, tests, time_s=time_s, **kwargs))


def _processes() -> set[str]:
    """What runs on this machine under the sandboxes of this process, kernel threads and others left out."""
    children = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(folder.name)
    found, todo = set(), [str(os.getpid())]
    while todo:
        new = children.get(todo.pop(), [])
        found.update(new)
        todo += new
    return found


# Ordinary programs


def test_right_and_wrong_programs(sandbox):
    assert _judge(sandbox, RIGHT) == Verdict("passed")
    assert _judge(sandbox, "def double(x):\n    return x * x\n").status == "failed"
    assert _judge(sandbox, "def double(x)\n    return 2 * x\n").reason.startswith("SyntaxError")
    assert _judge(sandbox, "def triple(x):\n    return 3 * x\n").reason.startswith("NameError")
    assert _judge(sandbox, "import no_such_module\n").reason.startswith("ModuleNotFoundError")
    assert _judge(sandbox, "").status == "failed"


@pytest.mark.parametrize(
    ("body", "tests"),
    [
        ("return [x, (x, {x}), {x: None}, frozenset([x]), x / 2, 1e400, -0.0]", "f(1) == [1, (1, {1}), {1: None}, frozenset([1]), 0.5, 1e400, 0]"),
        ("return b'a', 'ä\\ud800', bytearray(b'b'), 1j, range(3), 10 ** 5000", "f(1) == (b'a', 'ä\\ud800', b'b', 1j, range(3), 10 ** 5000)"),
        ("import decimal, fractions, datetime as d\n    return decimal.Decimal('0.1'), fractions.Fraction(1, 3), d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3), d.timedelta(1)",
         "[str(one) for one in f(1)] == ['0.1', '1/3', '2020-01-02', '2020-01-02 03:00:00', '1 day, 0:00:00']"),
        ("import collections\n    return collections.Counter('aab')", "f(1) == {'a': 2, 'b': 1}"),
        ("import collections\n    return collections.namedtuple('P', 'a b')(1, 2)", "f(1) == (1, 2)"),
        ("yield from range(3)", "list(f(1)) == [0, 1, 2] and f(1) != [0, 1, 2]"),
        ("return {1: 2}.keys()", "f(1) == {1}"),
        ("return lambda y: x + y", "f(1)(2) == 3"),
        ("x.append(4)", "(lambda l: (f(l), l))([3]) == (None, [3, 4])"),
        ("return math.floor(x)", "f(2.5) == math.floor(2.9)"),
        ("class Node:\n        value = x\n    return Node()", "f(5).value == 5"),
    ],
)  # fmt: skip
def test_values_cross_as_they_are(sandbox, body, tests):
    assert _judge(sandbox, f"import math\ndef f(x):\n    {body}\n", f"assert {tests}") == Verdict("passed")


def test_objects_of_the_program_can_be_passed_back_and_changed(sandbox):
    program = "class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\n"
    program += "def total(n):\n    return n.v + (total(n.next) if n.next else 0)\n"
    tests = "root = Node(1)\nroot.next = Node(2)\nassert total(root) == 3 and root.next.v == 2"
    assert _judge(sandbox, program, tests) == Verdict("passed")


def test_errors_keep_their_kind(sandbox):
    tests = "try:\n    f()\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"
    assert _judge(sandbox, "def f():\n    return 1 / 0\n", tests) == Verdict("passed")
    assert _judge(sandbox, "def f():\n    return [][0]\n", tests).reason.startswith("IndexError")


def test_tests_that_are_no_python_are_nobodys_failure(sandbox):
    verdict = _judge(sandbox, RIGHT, "assert double(2) = 4")
    assert verdict.status == "bad tests" and verdict.passed is None
    assert _judge(sandbox, RIGHT, TESTS, prelude="def (").passed is None


def test_the_prelude_is_trusted_but_for_its_targets(sandbox):
    prelude = "def double(x):\n    pass\ndef helper(x):\n    return 2 * x\n"
    tests = "assert double(3) == helper(3)"
    assert _judge(sandbox, RIGHT, tests, prelude=prelude, targets=("double",)).passed
    assert not _judge(sandbox, "def double(x):\n    return 7\ndef helper(x):\n    return 7\n", tests, prelude=prelude, targets=("double",)).passed  # fmt: skip
    assert not _judge(sandbox, RIGHT, tests, prelude=prelude).passed


# Programs that end, hang, or use too much: (program, statuses that are right)

ENDINGS = {
    "sys.exit at once": "import sys\nsys.exit(0)\n",
    "sys.exit in the call": "import sys\ndef double(x):\n    sys.exit(0)\n",
    "os._exit at once": "import os\nos._exit(0)\n",
    "os._exit in the call": "import os\ndef double(x):\n    os._exit(0)\n",
    "SystemExit": "raise SystemExit(0)\n",
    "KeyboardInterrupt": "def double(x):\n    raise KeyboardInterrupt\n",
    "BaseException": "def double(x):\n    raise BaseException('x')\n",
    "GeneratorExit": "def double(x):\n    raise GeneratorExit\n",
    "AssertionError": "def double(x):\n    raise AssertionError\n",
    "error without a text": "class E(BaseException):\n    def __str__(self):\n        raise E\ndef double(x):\n    raise E\n",
    "deep recursion": "def double(x):\n    return double(x) + 0\n",
    "deeper recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef double(x):\n    return [double(x)]\n",
    "recursion in C": "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\n"
    "def double(x):\n    return repr(A())\n",
    "endless nesting": "def double(x):\n    y = []\n    y.append(y)\n    return y\n",
    "huge allocation": "def double(x):\n    return bytearray(1 << 40)\n",
    "growing allocation": "def double(x):\n    y = [0]\n    while True:\n        y += y\n",
    "endless iterator": "import itertools\ndef double(x):\n    return itertools.repeat('x' * 1000)\n",
    "segmentation fault": "import ctypes\nctypes.string_at(0)\ndef double(x):\n    return 2 * x\n",
    "abort": "import os\nos.abort()\n",
}
HANGS = {
    "sleep": "import time\ntime.sleep(1000)\n",
    "busy loop": "while True:\n    pass\n",
    "busy loop in the call": "def double(x):\n    while True:\n        pass\n",
    "deaf to signals": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
    "alarm tricks": "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: None)\nsignal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\n"
    "while True:\n    signal.alarm(0)\n    time.sleep(0.1)\n",
    "endless output": "import sys\nwhile True:\n    print('x' * 10 ** 6)\n    print('x' * 10 ** 6, file=sys.stderr)\n",
    "endless number": "def double(x):\n    return 9 ** 9 ** 9\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_early_ends_do_not_pass(sandbox, name):
    # Time runs out on a busy machine before memory does.
    verdict = _judge(sandbox, ENDINGS[name])
    assert verdict.status in ("failed", "timed out"), verdict
    assert _judge(sandbox, RIGHT).passed


@pytest.mark.parametrize("name", HANGS)
def test_what_hangs_is_ended(sandbox, name):
    before = _processes()
    verdict = _judge(sandbox, HANGS[name], time_s=0.3)
    assert verdict == Verdict("timed out")
    assert _judge(sandbox, RIGHT).passed
    # As many as before: the next program's two wait in the places of the last's.
    assert len(_processes()) <= len(before) + 2


# Programs that do harm and then are right, so that only what they did is in question.

HARMLESS_AT_LAST = "\ndef double(x):\n    return 2 * x\n"


def _trying(*lines: str) -> str:
    """A program that tries each of the lines, whatever the others came to, and counts those that worked."""
    body = "".join(f"try:\n    {line}\n    done.append({number})\nexcept BaseException:\n    pass\n" for number, line in enumerate(lines))  # fmt: skip
    return f"import os, sys\ndone = []\n{body}{HARMLESS_AT_LAST}\ndef worked():\n    return done\n"


NOTHING_WORKED = TESTS + "assert worked() == [], worked()\n"


def test_no_processes_are_made(sandbox):
    before = _processes()
    program = _trying(
        "os.fork()",
        "os.posix_spawn('/bin/sh', ['sh'], {})",
        "os.execv('/bin/sh', ['sh', '-c', 'true'])",
        "__import__('subprocess').run(['true'])",
        "assert os.system('true') == 0",
        "os.forkpty()",
    )
    assert _judge(sandbox, program, NOTHING_WORKED) == Verdict("passed")
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    assert _judge(sandbox, bomb, time_s=0.3) == Verdict("timed out")
    daemon = "import os\ntry:\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n            while True: pass\nexcept OSError: pass\n"
    assert _judge(sandbox, daemon + RIGHT).passed
    assert len(_processes()) <= len(before) + 2


def test_others_are_not_signalled(sandbox):
    me = os.getpid()
    targets = [me, os.getppid(), -os.getpgrp(), -1, 0, 1]
    lines = [f"os.kill({pid}, {number})" for pid in targets for number in (9, 15, 2) if (pid, number) != (1, 0)]
    lines += ["os.kill(os.getppid(), 9)", "os.killpg(os.getpgrp(), 9)", f"os.killpg({os.getpgrp()}, 9)"]
    assert _judge(sandbox, _trying(*lines), NOTHING_WORKED) == Verdict("passed")
    assert _judge(sandbox, RIGHT).passed


def test_network_is_out_of_reach(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0l2t-sandbox-test")
        local.listen()
        port = server.getsockname()[1]
        connect = "__import__('socket').create_connection"
        program = _trying(
            f"{connect}(('127.0.0.1', {port}), timeout=0.2)",
            "__import__('socket').socket(1).connect(chr(0) + 'l2t-sandbox-test')",
            "__import__('socket').socket(2, 2).sendto(b'x', ('127.0.0.1', 9))",
            "__import__('_socket').socket(16, 3)",
        )
        assert _judge(sandbox, program, NOTHING_WORKED) == Verdict("passed")
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.fixture
def home_folder():
    """A folder of ours in the user's home."""
    with tempfile.TemporaryDirectory(prefix=".l2t-sandbox-test-", dir=Path.home()) as name:
        yield Path(name)


def test_files_are_out_of_reach(sandbox, tmp_path, home_folder):
    home = Path.home()
    secret, victim = home_folder / "secret", tmp_path / "victim"
    secret.write_text(SECRET)
    victim.write_text("still here")
    names = [
        str(secret),
        str(home_folder),
        str(tmp_path),
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/1/cmdline",
        "/sys",
        str(Path(__file__)),
    ]
    lines = [
        f"os.listdir({name!r}) if os.path.isdir({name!r}) else open({name!r}).read(); os.stat({name!r})"
        for name in names
    ]
    # Python's own folder may lie in the home folder; nothing else of it is there.
    lines += [f"assert len(os.listdir({str(home)!r})) > 1"]
    lines += [f"open({str(tmp_path / 'written')!r}, 'w')", f"open({str(home / 'l2t-sandbox-test')!r}, 'w')"]
    lines += [
        f"os.remove({str(victim)!r})",
        f"__import__('shutil').rmtree({str(tmp_path)!r})",
        f"os.truncate({str(victim)!r}, 0)",
    ]
    lines += [
        "open('/l2t-sandbox-test', 'w')",
        "open(os.__file__, 'a')",
        "os.chmod(os.__file__, 0)",
        "os.mkdir('/dev/x')",
    ]
    lines += [
        f"os.symlink({str(home_folder)!r}, 'folder'); open('folder/secret').read()",
        f"os.symlink({str(victim)!r}, 'file'); open('file', 'a')",
        f"os.link({str(victim)!r}, 'hard'); open('hard', 'a')",
        "open('/dev/shm/l2t-sandbox-test', 'w')",
        "__import__('multiprocessing.shared_memory').shared_memory.SharedMemory('l2t-sandbox-test', True, 16)",
    ]
    lines += ["os.chroot('/')", "os.chdir('/proc')", "open('/lib/l2t-sandbox-test', 'w')"]
    assert _judge(sandbox, _trying(*lines), NOTHING_WORKED) == Verdict("passed")
    assert victim.read_text() == "still here" and not (tmp_path / "written").exists()
    assert not (home / "l2t-sandbox-test").exists()


def test_the_work_folder_is_empty_private_and_small():
    program = (
        "import os\ndef look():\n    return os.getcwd(), os.listdir('.')\n"
        "def write(name, size):\n    with open(name, 'wb') as f:\n        return f.write(bytes(size))\n"
    )
    with _sandbox("namespaces") as sandbox:
        tests = "assert look() == ('/work', [])\nassert write('a', 1000) == 1000\nassert look() == ('/work', ['a'])"
        for _ in range(2):
            assert _judge(sandbox, program, tests) == Verdict("passed")
        assert _judge(sandbox, program, "write('a', 2 << 20)").reason.startswith("OSError: [Errno 27]")
        fill = "for k in range(9):\n    write(str(k), 1 << 20)"
        assert _judge(sandbox, program, fill).reason.startswith("OSError: [Errno 28]")
        inodes = "import os\ndef f():\n    for k in range(5000):\n        os.mkdir(str(k))\n"
        assert _judge(sandbox, inodes, "f()").reason.startswith("OSError: [Errno 28]")


def test_environment_and_descriptors_are_empty(sandbox, monkeypatch):
    program = "import os, sys\ndef look():\n    import json\n    return dict(os.environ), sys.argv[1:]\n"
    program += "def descriptors():\n    found = []\n    for fd in range(5, 3000):\n        try: os.read(fd, 1)\n        except OSError: continue\n        found.append(fd)\n    return found\n"
    environment = "assert not {'HOME', 'PATH', 'HF_TOKEN', 'L2T_SECRET'} & look()[0].keys(), look()\n"
    assert _judge(sandbox, program, environment + "assert descriptors() == []") == Verdict("passed")


def test_limits_are_not_raised(sandbox):
    limits = "__import__('resource')"
    program = _trying(
        f"{limits}.setrlimit({limits}.RLIMIT_AS, (-1, -1))",
        f"{limits}.setrlimit({limits}.RLIMIT_NOFILE, (100000, 100000))",
        f"{limits}.prlimit({os.getpid()}, {limits}.RLIMIT_NOFILE, (10, 10))",
        "os.setuid(0) or os.setuid(1)",
        "os.nice(-5)",
    )
    assert _judge(sandbox, program, NOTHING_WORKED) == Verdict("passed")
    assert not _judge(sandbox, "import os\nkept = [os.pipe() for _ in range(5000)]\n" + RIGHT).passed


def test_threads_that_never_end_are_no_reason_to_wait(sandbox):
    program = (
        "import threading, time\nfor _ in range(4):\n    threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        + RIGHT
    )
    assert _judge(sandbox, program) == Verdict("passed")
    endless = "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(1000,)).start()\n    except RuntimeError: pass\n"
    assert not _judge(sandbox, endless, time_s=0.5).passed
    assert _judge(sandbox, RIGHT).passed


# Forged verdicts: every one of these is a wrong program.

WRONG = "\ndef double(x):\n    return 5\n"
FORGERIES = {
    "success markers": "import os\nfor fd in range(256):\n    try: os.write(fd, b'[\"passed\", \"\"]\\n')\n    except OSError: pass\n" + WRONG,
    "messages of the sandbox": "import os, json\nm = json.dumps(['ok', [5, [None]]]).encode()\nm = len(m).to_bytes(4, 'big') + m\n"
    "for fd in range(3, 64):\n    try: os.write(fd, m * 3)\n    except OSError: pass\n" + WRONG,
    "printed": "print('passed')\nprint('[\"passed\", \"\"]')\n" + WRONG,
    "closed outputs": "import os, sys\nsys.stdout.close()\nos.close(1)\nos.close(2)\n" + WRONG,
    "closed channel": "import os\nos.closerange(0, 256)\n" + WRONG,
    "answer that is equal to everything": "class A(int):\n    def __eq__(self, o): return True\n    __ne__ = lambda s, o: False\n    __hash__ = int.__hash__\n"
    "def double(x):\n    return A()\n",
    "object that is equal to everything": "class A:\n    def __eq__(self, o): return True\n    def __getattr__(self, n): return self\n"
    "    def __class_getitem__(c, i): return c\ndef double(x):\n    return A()\n",
    "assert does nothing": "import builtins\nclass E(Exception):\n    pass\nbuiltins.AssertionError = E\nAssertionError = E\n" + WRONG,
    "checker replaced": "import sys\nfor m in list(sys.modules.values()):\n    for n in list(vars(m)):\n        if n in ('check', 'answer', '_check', '_watch'):\n"
    "            setattr(m, n, lambda *a: ('passed', ''))\n" + WRONG,
    "frames": "import sys, gc\ndef spoil():\n    f = sys._getframe()\n    while f:\n        for n in list(f.f_globals):\n"
    "            if n == 'check': f.f_globals[n] = lambda *a: None\n        f = f.f_back\ndef double(x):\n    spoil()\n    return 5\n",
    "gc": "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'check' in o:\n        o['check'] = lambda *a: ('passed', '')\n" + WRONG,
    "trace": "import sys\ndef trace(frame, event, arg):\n    if event == 'line' and 'test' in frame.f_code.co_filename: frame.f_lineno += 1\n    return trace\n"
    "sys.settrace(trace)\n" + WRONG,
    "StopIteration": "def double(x):\n    raise StopIteration\n",
    "built-in names": "def len(x): return 0\ndef abs(x): return 0\ndef set(x): return 0\ndef all(x): return True\ndef isinstance(*a): return True\n" + WRONG,
    "standard modules": "class math:\n    isclose = staticmethod(lambda *a, **k: True)\n    fabs = staticmethod(lambda x: 0)\n" + WRONG,
    "exit status": "import atexit, os\natexit.register(os._exit, 0)\nimport sys\nsys.exitfunc = lambda: 0\n" + WRONG,
    "answers ahead of the questions": "import json, os\nm = json.dumps(['ok', [5, [None]]]).encode()\nm = len(m).to_bytes(4, 'big') + m\n"
    "def double(x):\n    os.write(4, 3 * m)\n    return 5\n",
    "answer that no value has": "import json, os\nm = json.dumps(['ok', [['object', -1], [None]]]).encode()\n"
    "def double(x):\n    os.write(4, len(m).to_bytes(4, 'big') + m)\n    os._exit(0)\n",
    "answer without an end": "import os\ndef double(x):\n    m = b'[' * 1000000\n    os.write(4, len(m).to_bytes(4, 'big') + m)\n    os._exit(0)\n",
    "class that lies about itself": "class A:\n    __class__ = int\n    __eq__ = lambda s, o: True\ndef double(x):\n    return A()\n",
    "module of another kind": "import sys, types\nclass M(types.ModuleType):\n    def __getattribute__(s, n): return lambda *a: True\n"
    "sys.modules['solution'].__class__ = M\n" + WRONG,
    "wire replaced": "import sys\nw = sys.modules['wire']\nold = w.send\nw.send = lambda fd, m: old(fd, ['passed', ''])\n" + WRONG,
}  # fmt: skip
CAREFUL_TESTS = (
    "assert all(double(x) == 2 * x for x in (2, 3))\n"
    "assert not any(map(lambda x: double(x) != 2 * x, (2, 3)))\n"
    "assert len({double(1), double(2)}) == 2 and abs(double(4) - 8) < 1e-6 and math.isclose(double(4), 8)\n"
    "assert isinstance(double(1), int)\n"
)


@pytest.mark.parametrize("name", FORGERIES)
def test_verdicts_cannot_be_forged(sandbox, name):
    for tests in (
        TESTS,
        CAREFUL_TESTS,
        "assert math.isclose(double(2), 4)",
        "def check(f):\n    assert f(2) == 4\ncheck(double)",
    ):
        verdict = _judge(sandbox, FORGERIES[name], tests)
        assert verdict.status == "failed", (tests, verdict)
    assert _judge(sandbox, RIGHT, CAREFUL_TESTS) == Verdict("passed")


def test_stop_iteration_does_not_skip_what_comes_behind(sandbox):
    program = "def double(x):\n    raise StopIteration\n"
    assert not _judge(sandbox, program, "assert all(map(lambda x: double(x) == 2 * x, [1]))").passed
    assert not _judge(sandbox, program, "for x in map(double, [1]):\n    assert x == 2").passed


def test_a_test_that_catches_everything_does_not_pass_what_has_ended(sandbox):
    tests = "try:\n    double(2)\nexcept:\n    pass\n"
    assert _judge(sandbox, "def double(x):\n    raise ValueError\n", tests).passed
    assert not _judge(sandbox, ENDINGS["os._exit in the call"], tests).passed


def test_tests_are_never_in_the_programs_memory(sandbox):
    # The checker's request, and those before it, are sought in all the memory that the program has.
    needle = "def needle_of_the_tests(): return 4"
    program = (
        "import ctypes, gc\n"
        "def double(x):\n"
        "    word = '_'.join(['needle', 'of', 'the', 'tests'])\n"
        "    return [1 for o in gc.get_objects() for s in gc.get_referents(o) if isinstance(s, (str, bytes)) and len(word) < len(s) < 10 ** 6\n"
        "            and word in (s if isinstance(s, str) else s.decode('latin-1'))]\n"
    )
    tests = f"{needle}\nassert double(2) == []"
    for _ in range(2):
        assert _judge(sandbox, program, tests) == Verdict("passed")


# The sandbox itself


def test_verdicts_come_in_the_order_of_the_jobs():
    slow = "import time\ntime.sleep(0.2)\n" + RIGHT
    jobs = [Job(program, TESTS, time_s=30.0) for program in (slow, RIGHT, WRONG, RIGHT, slow, WRONG)]
    with Sandbox(workers=2) as sandbox:
        assert [verdict.passed for verdict in sandbox.run_all(jobs)] == [True, True, False, True, True, False]


def test_a_server_that_was_killed_is_replaced():
    with Sandbox(workers=1) as sandbox:
        sandbox._servers[0].process.kill()
        assert sandbox.run(Job(RIGHT, TESTS)).passed


def test_nothing_is_left_when_a_sandbox_is_closed_or_its_owner_dies(tmp_path):
    before = _processes()
    with Sandbox(workers=2) as sandbox:
        sandbox.run_all([Job(RIGHT, TESTS)] * 2)
    assert _processes() <= before
    script = tmp_path / "owner.py"
    script.write_text(
        "import os, signal\nfrom l2t_trl.evaluation.sandbox import Job, Sandbox\n"
        "sandbox = Sandbox(workers=1)\nprint(sandbox._servers[0].process.pid, flush=True)\n"
        "import threading\nthreading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "sandbox.run(Job('while True: pass', '', time_s=1.0))\n"
    )
    owner = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    keeper = Path("/proc", owner.stdout.strip())
    assert owner.returncode == -9
    for _ in range(200):
        if not keeper.exists() or (keeper / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the sandbox outlived its owner")


def test_without_isolation_nothing_is_run_unless_asked_for(monkeypatch):
    monkeypatch.delenv(sandbox_module.ALLOW_UNISOLATED, raising=False)
    with pytest.raises(UserError, match="are not run .*isolation 'none' was asked for.*L2T_ALLOW_UNISOLATED_CODE=1"):
        Sandbox(workers=1, isolation="none")
    monkeypatch.setenv(sandbox_module.ALLOW_UNISOLATED, "1")
    with Sandbox(workers=1, limits=LIMITS, isolation="none") as sandbox:
        assert sandbox.isolation == "none"
        assert sandbox.run(Job(RIGHT, TESTS)).passed
        assert sandbox.run(Job(HANGS["busy loop"], TESTS, time_s=0.2)).status == "timed out"
        daemon = "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\n    os._exit(0)\n"
        before = _processes()
        assert sandbox.run(Job(daemon + RIGHT, TESTS)).passed
        assert len(_processes()) <= len(before) + 2


@pytest.mark.parametrize(("name", "value"), [("isolation", "docker"), ("workers", 0)])
def test_settings_that_are_none(name, value):
    with pytest.raises(UserError, match=f"{name}: got"):
        Sandbox(**{name: value})


@pytest.mark.skipif(
    os.geteuid() != 0 or not _is_permitted("namespaces"), reason="needs another user to become, and namespaces"
)
def test_users_who_are_not_root_have_namespaces_too():
    # Where Python lies in root's home folder, another user is shown a copy of the path to it.
    code = f"""
import os, sys
sys.path.insert(0, {str(sandbox_module.PROCESS_FOLDER)!r})
import checks, isolation, program, wire
libc, base = isolation.libc, sys.base_prefix
top = "/" + base.split("/")[1]
if not os.stat(top).st_mode & 1:
    libc.unshare(isolation.CLONE_NEWNS)
    libc.mount(None, b"/", None, isolation.MS_REC | isolation.MS_PRIVATE, None)
    fd = os.open(base, os.O_RDONLY)
    libc.mount(b"tmpfs", top.encode(), b"tmpfs", 0, b"mode=755")
    os.makedirs(base)
    libc.mount(f"/proc/self/fd/{{fd}}".encode(), base.encode(), None, isolation.MS_BIND | isolation.MS_REC, None)
    os.close(fd)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
libc.prctl(isolation.PR_SET_DUMPABLE, 1, 0, 0, 0)
sys.stdout.write(repr(isolation.isolate("namespaces")) + repr(sorted(os.listdir("/"))))
"""
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert result.stdout.startswith("('namespaces', [])"), result
    assert "'home'" not in result.stdout and "'work'" in result.stdout
