"""`l2t eval`: what it stores, going on after it was killed, and that equal seeds give equal numbers."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trl import import_utils
from trl.import_utils import is_vllm_available

from l2t_trl.cli import main
from l2t_trl.data.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from l2t_trl.errors import UserError
from l2t_trl.evaluation import engines
from l2t_trl.evaluation.benchmark_run import model_fingerprint, seed_of
from l2t_trl.evaluation.journal import Journal
from l2t_trl.evaluation.sampling import RowSampler
from l2t_trl.models import TINY_FOLDER


# 5 questions twice in batches of 4: the last batch is a short one.
SIZES = {"limit": 5, "samples": 2, "max_tokens": 60, "batch_size": 4}
HOW = {"temperature": 1.0, "top_p": 0.9, "answer_probe": "</think>\\boxed{", "answer_tokens": 6, "depth_answers": 2}
END = 316  # the tiny model's token that ends a completion
CURVES = ("--depth-curve", "--budget-curve")
FILES = ("completions.jsonl", "depth.jsonl", "metrics.json", "settings.json", "depth_settings.json")


def command(output, *flags, model="tiny", benchmark="arithmetic", **settings) -> list[str]:
    words = ["eval", "--model", str(model), "--benchmark", benchmark, "--output", str(output), *flags]
    return words + [word for name, value in (SIZES | HOW | settings).items() for word in (f"--{name}", str(value))]


def contents(output: Path) -> dict[str, bytes]:
    return {name: (output / "arithmetic" / name).read_bytes() for name in FILES}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refuse_engine(*args, **kwargs):
    raise AssertionError("the model was loaded")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """An evaluation that nothing has interrupted."""
    output = tmp_path_factory.mktemp("eval") / "unbroken"
    assert main(command(output, *CURVES)) == 0
    return output


# From end to end


def test_every_completion_is_stored_once_with_its_verdict(unbroken):
    stored = lines(unbroken / "arithmetic" / "completions.jsonl")
    assert sorted((line["id"], line["sample"]) for line in stored) == [(str(i), s) for i in range(5) for s in (0, 1)]
    rows = {row["id"]: row for row in get_benchmark("arithmetic").load()}
    for line in stored:
        assert line["tokens"] == len(line["ids"]) <= 60
        assert line["is_truncated"] == (line["ids"][-1] != END)
        assert line["is_correct"] == line["text"].endswith("\\boxed{" + rows[line["id"]]["answer"] + "}")
    # The two samples of a question differ.
    assert len({line["text"] for line in stored}) > 5


def test_metrics_are_those_of_the_stored_completions(unbroken):
    stored = lines(unbroken / "arithmetic" / "completions.jsonl")
    metrics = json.loads((unbroken / "arithmetic" / "metrics.json").read_text())
    assert metrics["accuracy"] == sum(line["is_correct"] for line in stored) / 10
    low, high = metrics["accuracy_interval"]
    assert low <= metrics["accuracy"] <= high
    assert metrics["mean_tokens"] == sum(line["tokens"] for line in stored) / 10
    assert metrics["truncated_share"] == sum(line["is_truncated"] for line in stored) / 10
    # Tiers come in turn: the fifth question is of tier 1 again.
    assert {tier: part["num_completions"] for tier, part in metrics["tiers"].items()} == {
        "1": 4,
        "2": 2,
        "3": 2,
        "4": 2,
    }
    assert metrics["pass_at"]["1"] == pytest.approx(metrics["accuracy"])
    assert list(metrics["majority_at"]) == ["1", "2"]
    curve = metrics["depth_curve"]
    assert curve["num_cut"][0] == curve["num_completions"] == 10 and curve["tokens"][0] == 0
    assert metrics["budget_curve"]["accuracy"][-1] == metrics["accuracy"]
    assert len(metrics["budget_curve"]["accuracy_when_asked"]) == len(metrics["budget_curve"]["budgets"])


def test_table_has_a_line_per_tier(unbroken):
    table = (unbroken / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "arithmetic",
        *(f"arithmetic, tier {tier}" for tier in (1, 2, 3, 4)),
    ]
    assert len({line.count("|") for line in table}) == 1


def test_nothing_is_done_twice(unbroken, monkeypatch, capsys):
    before = contents(unbroken)
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    assert main(command(unbroken, *CURVES)) == 0
    assert contents(unbroken) == before
    assert "| arithmetic | 5 | 2 |" in capsys.readouterr().out


def test_curves_can_be_asked_for_later(unbroken, tmp_path):
    assert main(command(tmp_path)) == 0
    assert "depth_curve" not in json.loads((tmp_path / "arithmetic" / "metrics.json").read_text())
    assert main(command(tmp_path, *CURVES)) == 0
    assert contents(tmp_path) == contents(unbroken)


# Equal seeds


def test_equal_seeds_give_equal_completions_and_others_do_not(unbroken, tmp_path):
    torch.manual_seed(99)
    assert main(command(tmp_path / "again", *CURVES)) == 0
    assert contents(tmp_path / "again") == contents(unbroken)
    assert main(command(tmp_path / "other", seed=1)) == 0
    stored = [lines(one / "arithmetic" / "completions.jsonl") for one in (unbroken, tmp_path / "other")]
    assert [line["text"] for line in stored[0]] != [line["text"] for line in stored[1]]


def test_a_completion_does_not_depend_on_what_is_beside_it(unbroken, tmp_path):
    # Other batches round otherwise, which may turn a token here and there, but not the random numbers.
    assert main(command(tmp_path, limit=3, samples=1, batch_size=3)) == 0
    before = {(line["id"], line["sample"]): line for line in lines(unbroken / "arithmetic" / "completions.jsonl")}
    others = lines(tmp_path / "arithmetic" / "completions.jsonl")
    assert sum(line["ids"] == before[line["id"], 0]["ids"] for line in others) >= 2


def test_seeds_depend_on_every_part():
    parts = [(0, "gsm8k", "1", 0), (1, "gsm8k", "1", 0), (0, "math500", "1", 0), (0, "gsm8k", "10", 0)]
    assert len({seed_of(*part) for part in [*parts, (0, "gsm8k", "1", 1)]}) == 5
    # Of no platform and no process: written down here.
    assert seed_of(0, "gsm8k", "1", 0) == seed_of(*parts[0]) < 2**63


def test_row_sampler_follows_the_nucleus_by_hand():
    # Probabilities 0.5, 0.3, 0.15, 0.05: a nucleus of 0.7 holds the first two, 5 to 3.
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    chosen = RowSampler(range(4000), 1.0, 0.7)(None, scores).argmax(-1)
    counts = torch.bincount(chosen, minlength=4)
    assert counts[2] == counts[3] == 0
    # Five standard deviations of a binomial.
    assert abs(counts[0] / 4000 - 5 / 8) < 5 * (5 / 8 * 3 / 8 / 4000) ** 0.5
    # At temperature 0.5 probabilities are squared: 0.25 to 0.09 among the first two of the nucleus.
    chosen = RowSampler(range(4000), 0.5, 0.9)(None, scores).argmax(-1)
    share = (chosen == 0).float().mean()
    assert abs(share - 0.25 / 0.34) < 5 * (0.25 * 0.09 / 0.34**2 / 4000) ** 0.5


def test_row_sampler_draws_for_each_row_alone():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 6, 50, generator=generator)
    together, alone = RowSampler(range(6), 1.0, 0.9), RowSampler([4], 1.0, 0.9)
    for step in scores:
        assert torch.equal(together(None, step)[4], alone(None, step[4:5])[0])


# Going on


@pytest.mark.parametrize(
    ("num_lines", "half"),
    [(0, b'{"id": "3", "sam'), (4, b""), (6, b""), (7, b'{"id"'), (8, b'{"id": "0", "sample": 0, "text": "caf\xc3')],
)
def test_a_cut_off_file_is_gone_on_with(unbroken, tmp_path, num_lines, half):
    folder = tmp_path / "out" / "arithmetic"
    shutil.copytree(unbroken / "arithmetic", folder)
    for name in ("depth.jsonl", "metrics.json", "depth_settings.json"):
        (folder / name).unlink()
    whole = (folder / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "completions.jsonl").write_bytes(b"".join(whole[:num_lines]) + half)
    assert main(command(tmp_path / "out", *CURVES)) == 0
    assert contents(tmp_path / "out") == contents(unbroken)


def test_a_cut_off_depth_curve_is_gone_on_with(unbroken, tmp_path):
    shutil.copytree(unbroken / "arithmetic", tmp_path / "arithmetic")
    path = tmp_path / "arithmetic" / "depth.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert main(command(tmp_path, *CURVES)) == 0
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.slow
def test_killed_and_gone_on_with_equals_unbroken(unbroken, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "l2t_trl.cli", *command(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    path = tmp_path / "arithmetic" / "completions.jsonl"
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(lines(path)) <= 10
    assert main(command(tmp_path, *CURVES)) == 0
    assert contents(tmp_path) == contents(unbroken)


def test_other_settings_are_refused(unbroken, monkeypatch, capsys):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    before = contents(unbroken)
    for name, value, there in (("temperature", 0.5, 1.0), ("seed", 3, 0), ("limit", 4, 5), ("batch_size", 2, 4)):
        assert main(command(unbroken, *CURVES, **{name: value})) == 2
        shown = "questions" if name == "limit" else name
        assert f"{shown} is {value}, there it is {there}" in capsys.readouterr().err
    assert main(command(unbroken, *CURVES, answer_tokens=7)) == 2
    assert "answer_tokens is 7, there it is 6" in capsys.readouterr().err
    assert contents(unbroken) == before


def test_another_model_under_the_same_name_is_refused(tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(TINY_FOLDER, model)
    assert main(command(tmp_path / "out", model=model, limit=1, samples=1)) == 0
    assert model_fingerprint(str(model)) == model_fingerprint(str(TINY_FOLDER))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    assert main(command(tmp_path / "out", model=model, limit=1, samples=1)) == 2
    assert "weights is" in capsys.readouterr().err


def test_a_damaged_line_is_named(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken / "arithmetic", tmp_path / "arithmetic")
    path = tmp_path / "arithmetic" / "completions.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([whole[0], b"rubbish\n", *whole[2:]]))
    assert main(command(tmp_path)) == 2
    assert "completions.jsonl:2 is damaged" in capsys.readouterr().err
    path.write_bytes(b"".join([whole[1], *whole[1:]]))
    assert main(command(tmp_path)) == 2
    assert "completions.jsonl:1 belongs to another evaluation" in capsys.readouterr().err


def test_batches_begin_where_those_of_an_unbroken_run_do(tmp_path):
    keys = [{"id": number} for number in range(10)]
    whole = b"".join(b'{"id": %d}\n' % number for number in range(6))
    # Six of ten lines and half of a seventh: the second batch of four is begun anew, and nothing of it stays.
    (tmp_path / "file").write_bytes(whole + b'{"id": 6, "text": "half of')
    with Journal(tmp_path / "file", keys, 4) as journal:
        assert [line["id"] for line in journal.done] == [0, 1, 2, 3]
        assert [[key["id"] for key in batch] for batch in journal.batches] == [[4, 5, 6, 7], [8, 9]]
        assert (tmp_path / "file").read_bytes() == whole[: 4 * len(b'{"id": 0}\n')]
        journal.add(keys[4:8])
        journal.add(keys[8:])
        assert journal.batches == []
    with Journal(tmp_path / "file", keys, 4) as journal:
        assert journal.done == keys


def test_the_file_holds_whole_lines_and_memory_what_is_kept_of_them(tmp_path):
    lines = [{"id": number, "ids": [number] * 9} for number in range(3)]
    keys = [{"id": line["id"]} for line in lines]
    for done in (0, 2):
        with Journal(tmp_path / "file", keys, 2, lambda line: line | {"ids": len(line["ids"])}) as journal:
            assert journal.done == [{"id": number, "ids": 9} for number in range(done)]
            journal.add(lines[done : done + 2])
            assert journal.done[-1] == {"id": min(done + 1, 2), "ids": 9}
    assert [json.loads(line) for line in (tmp_path / "file").read_text().splitlines()] == lines


def test_two_at_a_time_are_refused(tmp_path):
    keys = [{"id": "0"}]
    with Journal(tmp_path / "file", keys, 1), pytest.raises(UserError, match="another evaluation is writing"):
        Journal(tmp_path / "file", keys, 1).__enter__()


# A full disk


@pytest.fixture
def file_size_limit():
    """Set how large files may get: a write beyond it fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing(unbroken, tmp_path, capsys, file_size_limit):
    whole = (unbroken / "arithmetic" / "completions.jsonl").read_bytes()
    first_batch = sum(len(line) for line in whole.splitlines(keepends=True)[:4])
    file_size_limit(first_batch + 100)
    assert main(command(tmp_path)) == 2
    file_size_limit(resource.RLIM_INFINITY)
    error = capsys.readouterr().err
    assert "completions.jsonl cannot be written (File too large). The 4 of 10 lines before are kept" in error
    assert (tmp_path / "arithmetic" / "completions.jsonl").read_bytes() == whole[:first_batch]
    assert main(command(tmp_path, *CURVES)) == 0
    assert contents(tmp_path) == contents(unbroken)


def test_a_full_disk_keeps_the_numbers_before(unbroken, tmp_path, capsys, file_size_limit):
    shutil.copytree(unbroken / "arithmetic", tmp_path / "arithmetic")
    before = contents(tmp_path)
    file_size_limit(100)
    assert main(command(tmp_path, *CURVES)) == 2
    assert "metrics.json cannot be written (File too large)" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert sorted(path.name for path in (tmp_path / "arithmetic").iterdir()) == sorted(FILES)


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(tmp_path / "file")) == 2
    assert f"--output {tmp_path / 'file'} cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that nobody may write to")
def test_a_read_only_output_is_named(capsys):
    assert main(command("/proc")) == 2
    assert "l2t eval: error: --output /proc cannot be written: " in capsys.readouterr().err


def test_what_is_no_result_is_left_out_of_the_table_and_said(unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    shutil.copytree(unbroken / "arithmetic", tmp_path / "arithmetic")
    for name, text in (("half", "{"), ("other", "{}"), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    assert main(command(tmp_path, *CURVES)) == 0
    error = capsys.readouterr().err
    assert f"{tmp_path / 'half' / 'metrics.json'} is left out of results.md: it cannot be read (" in error
    for name in ("other", "list"):
        assert f"{tmp_path / name / 'metrics.json'} is left out of results.md: it is not of an evaluation." in error
    assert (tmp_path / "results.md").read_bytes() == (unbroken / "results.md").read_bytes()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_settings_are_named(tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    (tmp_path / "arithmetic").mkdir()
    (tmp_path / "arithmetic" / "settings.json").write_text(text)
    assert main(command(tmp_path)) == 2
    assert "settings.json cannot be read (" in capsys.readouterr().err


# Mistakes


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("samples", "0", "must be a whole number, 1 or larger, got '0'"),
        ("limit", "0", "must be a whole number, 1 or larger, got '0'"),
        ("limit", "few", "must be a whole number, 1 or larger, got 'few'"),
        ("max_tokens", "-1", "must be a whole number, 1 or larger, got '-1'"),
        ("temperature", "nan", "must be a finite number, 0 or larger, got 'nan'"),
        ("top_p", "0", "must be above 0 and at most 1, got '0'"),
        ("seed", "-1", "must be a whole number, 0 or larger, got '-1'"),
        ("dtype", "float8", "invalid choice: 'float8' (choose from"),
        ("episode_format", "words", "invalid choice: 'words' (choose from"),
    ],
)
def test_a_wrong_value_is_one_line(tmp_path, capsys, option, value, expected):
    with pytest.raises(SystemExit) as caught:
        main(command(tmp_path / "out", **{option: value}))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"l2t eval: error: argument --{option}: {expected}")
    assert line.endswith("(l2t eval --help lists the options)")
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*command(tmp_path), "--sample", "3"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "l2t eval: error: unrecognized arguments: --sample 3 (l2t eval --help lists the options)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "has no file <split>.jsonl, nor of another type that can be read. Put the data there"),
        ("", "gsm8k: openai/gsm8k has no rows in its split 'test' under {root}; mend the file, or set L2T_DATA_ROOT"),
        ("{}\n", "gsm8k: openai/gsm8k has no column 'question'"),
        ("no\n", "test.jsonl:1: not valid JSON"),
    ],
)
def test_a_benchmark_file_that_cannot_be_used(tmp_path, monkeypatch, capsys, text, expected):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    folder = tmp_path / "openai/gsm8k/main"
    folder.mkdir(parents=True)
    if text is not None:
        (folder / "test.jsonl").write_text(text)
    assert main(command(tmp_path / "out", benchmark="gsm8k")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("l2t eval: error: ") and expected.format(root=tmp_path) in line


def test_spaces_between_benchmarks_do_not_matter(unbroken, monkeypatch, capsys):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    assert main(command(unbroken, *CURVES, benchmark=" arithmetic , arithmetic")) == 0
    assert main(command(unbroken, *CURVES, benchmark="arithmetic,")) == 2
    assert "'' is no benchmark. There are aime24" in capsys.readouterr().err


def test_an_unknown_benchmark_is_named_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    assert main(command(tmp_path / "out", benchmark="gsm8k,arithmetik", model="/no/such/model")) == 2
    assert "'arithmetik' is no benchmark. Did you mean arithmetic?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_named(tmp_path, capsys):
    assert main(command(tmp_path, model="/no/such/model")) == 2
    assert "--model /no/such/model: no such folder" in capsys.readouterr().err


def test_completions_that_the_model_has_no_room_for_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    assert main(command(tmp_path, max_tokens=1024)) == 2
    error = capsys.readouterr().err
    assert "--max_tokens 1024: with the longest prompt" in error and "the model's 1024 positions" in error


def test_room_for_the_answers_at_the_cuts_is_asked_for_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    main(command(tmp_path / "all", max_tokens=1024))
    room = int(capsys.readouterr().err.split("Set ")[1].split()[0])
    # The probe is 2 tokens or more, the answer 6.
    assert main(command(tmp_path / "depth", "--depth_curve", max_tokens=room - 7)) == 2
    assert "and what asks for the answer" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="the model was loaded"):
        main(command(tmp_path / "none", max_tokens=room))


def test_without_max_tokens_the_model_says_what_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "TransformersEngine", refuse_engine)
    words = command(tmp_path)
    index = words.index("--max_tokens")
    with pytest.raises(AssertionError, match="the model was loaded"):
        main(words[:index] + words[index + 2 :])
    stored = json.loads((tmp_path / "arithmetic" / "settings.json").read_text())
    assert 900 < stored["max_tokens"] < 1024


def test_vllm_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: False)
    assert main(command(tmp_path, "--vllm")) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


def test_depth_needs_answers_in_words(tmp_path, monkeypatch, capsys):
    rows = [{"id": "0", "question": "Write a function.", "answer": None}]
    made_up = Benchmark("made-up", 1, lambda: rows, lambda texts, rows: [None] * len(texts))
    monkeypatch.setitem(BENCHMARKS, "made-up", made_up)
    assert main(command(tmp_path, "--depth_curve", benchmark="made-up")) == 2
    assert "--depth_curve: made-up has no answers in words" in capsys.readouterr().err
    # Without it there is nothing to vote on, and nothing that could be judged.
    assert main(command(tmp_path, benchmark="made-up")) == 0
    metrics = json.loads((tmp_path / "made-up" / "metrics.json").read_text())
    assert metrics["majority_at"] == {} and metrics["accuracy"] is None and metrics["num_unjudged"] == 2


def test_rows_with_one_id_and_missing_rows_are_said(tmp_path, monkeypatch, capsys):
    rows = [{"id": "0", "question": "1 + 1?", "answer": "2"}]
    monkeypatch.setitem(BENCHMARKS, "few", Benchmark("few", 3, lambda: rows, lambda texts, rows: [False] * len(texts)))
    words = command(tmp_path, benchmark="few", samples=1)
    index = words.index("--limit")
    assert main(words[:index] + words[index + 2 :]) == 0
    assert "few: 1 questions where 3 are expected" in capsys.readouterr().err
    monkeypatch.setitem(
        BENCHMARKS, "twice", Benchmark("twice", 2, lambda: rows * 2, lambda texts, rows: [False] * len(texts))
    )
    assert main(command(tmp_path, benchmark="twice")) == 2
    assert "twice: two rows have the same id" in capsys.readouterr().err


# Adapters and other prompts


def test_adapters_are_evaluated(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_FOLDER), adapter).save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_FOLDER / name, tmp_path / "adapter")
    for name, model in (("adapted", tmp_path / "adapter"), ("base", "tiny")):
        assert main(command(tmp_path / name, model=model, limit=2, samples=1, temperature=0)) == 0
    texts = [
        [line["text"] for line in lines(tmp_path / name / "arithmetic" / "completions.jsonl")]
        for name in ("adapted", "base")
    ]
    assert texts[0] != texts[1]


def test_prompts_are_the_questions_with_what_is_asked_beside(tmp_path, monkeypatch):
    seen = []

    class Engine:
        end_ids = [END]

        def __init__(self, path, tokenizer, dtype):
            self.tokenizer = tokenizer

        def complete(self, prompts, seeds, max_tokens, temperature, top_p):
            seen.extend(self.tokenizer.batch_decode(prompts))
            return [[END]] * len(prompts)

    monkeypatch.setattr(engines, "TransformersEngine", Engine)
    settings = {"limit": 1, "samples": 1}
    assert main(command(tmp_path / "a", **settings)) == 0
    assert main(command(tmp_path / "b", **settings, system_prompt="add", instruction="read")) == 0
    question = get_benchmark("arithmetic").load()[0]["question"]
    assert seen[0] == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert seen[1] == (
        f"<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n{question}\nread<|im_end|>\n<|im_start|>assistant\n"
    )


# vLLM

# In a process of its own, since an engine leaves traces in its process; the second command is given the first one's.
IN_VLLM = """
import json, shutil, sys
from pathlib import Path
from l2t_trl.cli import main
from l2t_trl.evaluation import engines

unbroken, killed = (Path(words[words.index("--output") + 1]) for words in json.loads(sys.argv[1]))
made, build = [], engines.VllmEngine

def build_once(*args, **kwargs):
    if not made:
        made.append(build(*args, **kwargs))
    return made[0]

engines.VllmEngine = build_once
first, second = json.loads(sys.argv[1])
assert main(first) == 0
shutil.copytree(unbroken, killed)
whole = (unbroken / "arithmetic" / "completions.jsonl").read_bytes()
(killed / "arithmetic" / "completions.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
(killed / "arithmetic" / "depth.jsonl").unlink()
assert main(second) == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not is_vllm_available(), reason="vLLM is not installed (make install VLLM=1)")
def test_vllm_gives_the_same_interrupted_or_not(tmp_path):
    # Prompts of more tokens together than vLLM reads in one step: it may not read a part of one, see VllmEngine.
    settings = {"samples": 4, "batch_size": 10, "system_prompt": "hmm let me see " * 100}
    commands = [command(tmp_path / name, "--vllm", *CURVES, **settings) for name in ("unbroken", "killed")]
    finished = subprocess.run(
        [sys.executable, "-c", IN_VLLM, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "| arithmetic | 5 | 4 |" in finished.stdout
    # None of vLLM's hundreds of lines.
    assert "INFO" not in finished.stdout + finished.stderr
    rows = {row["id"]: row for row in get_benchmark("arithmetic").load()}
    for line in lines(tmp_path / "unbroken" / "arithmetic" / "completions.jsonl"):
        assert line["is_truncated"] == (line["ids"][-1] != END) and line["tokens"] == len(line["ids"])
        assert line["is_correct"] == line["text"].endswith("\\boxed{" + rows[line["id"]]["answer"] + "}")
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")
