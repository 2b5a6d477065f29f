"""`l2t score` against the same numbers computed literally, and every mistake in its input."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from l2t_trl.cli import main


PROBE = "</think>\\boxed{"
PROBE_END = "}"
# Each completion in pieces that are tokenised apart, as tags are tokens of their own: the spans follow from their
# lengths. The last piece is the answer span.
CHAT = [{"role": "user", "content": "Add 23+34"}]
PIECES = [
    (
        CHAT,
        "57",
        [
            "<think><episode_1>units 3+4=7</episode_1>",
            "<episode_2>units 3+4=7</episode_2>",
            "<episode_3>tens 2+3+0=5</episode_3>",
            "</think>\\boxed{57}<|im_end|>",
        ],
    ),
    (CHAT, "57", ["<think><episode_1>units 3+4=8</episode_1>", "</think>\\boxed{58}<|im_end|>"]),
    # Cut off inside its second episode: the answer span is empty.
    ("Add 99+99", "198", ["<think><episode_1>units 9+9=18</episode_1>", "<episode_2>tens 9+9+", ""]),
    # No tags: one episode, the whole thought.
    ("Add 7+8, please", "15", ["7+8 is 15, I think", "</think>\\boxed{15}"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A small random model whose probabilities are far from uniform."""
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.15,
            tie_word_embeddings=False,
        )
        Qwen2ForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of_pieces():
    return [{"prompt": prompt, "completion": "".join(pieces), "answer": answer} for prompt, answer, pieces in PIECES]


def score(folder, data, output, *options):
    return main(
        ["score", "--model", str(folder), "--data", str(data), "--output", str(output)]
        + ["--answer_probe", PROBE, "--answer_probe_end", PROBE_END, *options]
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def literal_scores(folder, ratio, damping, alpha, beta, is_per_token=False):
    """Every J by a forward of its own, every g by a backward through the whole model, F and q as dense formulas."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).double().eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_probs(context, ids):
        logits = model(torch.tensor([context + ids])).logits[0]
        rows = torch.log_softmax(logits, dim=-1)
        return [rows[len(context) + t - 1, token] for t, token in enumerate(ids)]

    mlp = model.model.layers[-1].mlp
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    bases = []
    for weight in weights:
        left, _, right = torch.linalg.svd(weight.detach())
        bases.append((left, right, max(1, int(ratio * min(weight.shape)))))

    completions = []
    for prompt, answer, pieces in PIECES:
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        prompt_ids, spans, ids = encode(prompt), [], []
        for piece in pieces:
            spans.append((len(ids), len(ids) + len(encode(piece))))
            ids += encode(piece)
        answer_ids = encode(answer + PROBE_END)
        j, gradients = [], []
        for cut in [0, *(end for _, end in spans[:-1])]:
            with torch.no_grad():
                total = sum(log_probs(prompt_ids + ids[:cut] + encode(PROBE), answer_ids))
            j.append((total / len(answer_ids) if is_per_token else total).exp().item())
        for start, end in spans:
            if start == end:
                continue
            total = sum(log_probs(prompt_ids, ids)[start:end])
            g = []
            for gradient, (left, right, rank) in zip(torch.autograd.grad(total, weights), bases, strict=True):
                g += [left[:, i] @ gradient @ right[i] for i in range(rank)]
            gradients.append(torch.stack(g))
        completions.append((spans, j, gradients))

    every = [g for _, _, gradients in completions for g in gradients]
    fisher = sum(torch.outer(g, g) for g in every) / len(every)
    damped = fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
    q = [[(g @ torch.linalg.inv(damped) @ g).item() for g in gradients] for _, _, gradients in completions]
    mean_square = sum(value**2 for row in q for value in row) / len(q)
    result = []
    for (spans, j, _), q_row in zip(completions, q, strict=True):
        episodes = []
        for k, value in enumerate(q_row, start=1):
            is_answer = k == len(spans)
            gain = 0.0 if is_answer else j[k] - j[k - 1]
            penalty = value**2 / mean_square
            episodes.append(
                {
                    "start": spans[k - 1][0],
                    "end": spans[k - 1][1],
                    "correctness": j[-1] if is_answer else j[k],
                    "gain": gain,
                    "information": value,
                    "penalty": penalty,
                    "reward": gain - beta * penalty,
                    "is_answer": is_answer,
                }
            )
        result.append((j[0], episodes, alpha * sum(episode["reward"] for episode in episodes)))
    return result


def assert_scored(rows, expected, outcomes):
    for row, (before, episodes, process_reward), outcome in zip(rows, expected, outcomes, strict=True):
        assert row["correctness_before"] == pytest.approx(before, rel=1e-4)
        assert row["outcome"] == outcome
        assert row["reward"] == pytest.approx(outcome + process_reward, rel=1e-3, abs=1e-5)
        assert len(row["episodes"]) == len(episodes)
        for got, want in zip(row["episodes"], episodes, strict=True):
            for key in ("start", "end", "is_answer"):
                assert got[key] == want[key]
            for key in ("correctness", "information", "penalty"):
                assert got[key] == pytest.approx(want[key], rel=1e-3), key
            # A gain is the difference of numbers of about this size.
            assert got["gain"] == pytest.approx(want["gain"], rel=1e-3, abs=1e-3 * before)
            assert got["reward"] == pytest.approx(want["reward"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("batch_size", ["1", "3"])
@pytest.mark.parametrize("is_per_token", [False, True])
def test_equals_the_literal_computation(folder, tmp_path, batch_size, is_per_token):
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    options = ["--proxy_rank_ratio", "0.07", "--fisher_damping", "0.01", "--process_reward_coef", "0.5"]
    options += ["--compression_coef", "0.3", "--batch_size", batch_size]
    options += ["--answer_likelihood", "per_token" if is_per_token else "joint"]
    assert score(folder, data, tmp_path / "out.jsonl", *options) == 0
    expected = literal_scores(folder, 0.07, 0.01, 0.5, 0.3, is_per_token)
    # Two directions of each of three projections; more spans than coordinates, so penalties differ.
    penalties = [episode["penalty"] for _, episodes, _ in expected for episode in episodes]
    assert max(penalties) > 1.5 * min(penalties)
    assert_scored(read(tmp_path / "out.jsonl"), expected, [1, 0, 0, 1])


def test_token_ids_score_as_their_text(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = rows_of_pieces()
    for row in rows:
        row["completion_ids"] = tokenizer(row.pop("completion"), add_special_tokens=False)["input_ids"]
    data = write_rows(tmp_path / "in.jsonl", rows)
    assert score(folder, data, tmp_path / "ids.jsonl", "--proxy_rank_ratio", "0.07", "--fisher_damping", "0.01") == 0
    results = read(tmp_path / "ids.jsonl")
    assert_scored(results, literal_scores(folder, 0.07, 0.01, 0.8, 0.6), [1, 0, 0, 1])
    assert [row["completion"] for row in results] == ["".join(pieces) for _, _, pieces in PIECES]
    assert [row["completion_ids"] for row in results] == [row["completion_ids"] for row in rows]


def test_episode_text_and_other_fields(folder, tmp_path):
    rows = rows_of_pieces()
    rows[0]["tier"] = {"name": "ü"}
    assert score(folder, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl") == 0
    results = read(tmp_path / "out.jsonl")
    for row, (prompt, answer, pieces) in zip(results, PIECES, strict=True):
        assert [episode["text"] for episode in row["episodes"]] == [piece for piece in pieces if piece]
        assert (row["prompt"], row["answer"], row["completion"]) == (prompt, answer, "".join(pieces))
    assert results[0]["tier"] == {"name": "ü"}
    assert list(results[1]) == [
        *("prompt", "completion", "answer", "correctness_before", "episodes", "outcome", "reward")
    ]


def test_empty_completion_has_no_episode(folder, tmp_path):
    rows = [*rows_of_pieces(), {"prompt": CHAT, "completion": "", "answer": "57"}]
    assert score(folder, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl") == 0
    results = read(tmp_path / "out.jsonl")
    assert (results[-1]["episodes"], results[-1]["outcome"], results[-1]["reward"]) == ([], 0, 0)
    # J before anything is written is the same for two completions of one question.
    assert results[-1]["correctness_before"] == pytest.approx(results[0]["correctness_before"], rel=1e-4)
    # It still counts among the completions that the penalty's unit is a mean over: 5 in all.
    penalties = [episode["penalty"] for row in results for episode in row["episodes"]]
    assert sum(penalties) == pytest.approx(5, rel=1e-5)


def test_answers_that_cannot_be_judged(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("l2t_trl.rewards.accuracy", lambda completions, answer: [None, 1.0, 0.0, 1.0])
    assert score(folder, write_rows(tmp_path / "in.jsonl", rows_of_pieces()), tmp_path / "out.jsonl") == 0
    results = read(tmp_path / "out.jsonl")
    assert (results[0]["outcome"], results[0]["reward"]) == (None, None)
    assert [row["outcome"] for row in results[1:]] == [1, 0, 1]
    assert results[0]["episodes"][0]["reward"] is not None


def test_half_precision(folder, tmp_path):
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    for dtype in ("float32", "bfloat16"):
        assert score(folder, data, tmp_path / f"{dtype}.jsonl", "--dtype", dtype) == 0
    single, half = read(tmp_path / "float32.jsonl"), read(tmp_path / "bfloat16.jsonl")
    assert single[0]["correctness_before"] != half[0]["correctness_before"]
    assert half[0]["correctness_before"] == pytest.approx(single[0]["correctness_before"], rel=0.5)


def test_only_empty_completions(folder, tmp_path):
    data = write_rows(tmp_path / "in.jsonl", [{"prompt": "Add 1+1", "completion_ids": [], "answer": "2"}])
    assert score(folder, data, tmp_path / "out.jsonl") == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert row["episodes"] == [] and row["completion"] == ""


def test_options_reach_the_segmentation(folder, tmp_path):
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    assert score(folder, data, tmp_path / "out.jsonl", "--max_episodes", "2") == 0
    assert [len(row["episodes"]) for row in read(tmp_path / "out.jsonl")] == [3, 2, 2, 2]
    assert score(folder, data, tmp_path / "out.jsonl", "--episode_format", "paragraph") == 0
    assert [len(row["episodes"]) for row in read(tmp_path / "out.jsonl")] == [2, 2, 1, 2]


def test_plain_prompts_get_the_tokenizers_special_tokens(folder, tmp_path):
    # A tokenizer that opens every text with a token of its own: TRL's trainers keep it for plain prompts.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.2,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "in.jsonl", [{"prompt": "1+1", "completion": "is two", "answer": "2"}])
    assert score(tmp_path / "model", data, tmp_path / "out.jsonl") == 0
    (row,) = read(tmp_path / "out.jsonl")
    context = [256, *backend.encode("1+1", add_special_tokens=False).ids, 257]
    context += backend.encode(PROBE, add_special_tokens=False).ids
    answer = backend.encode("2}", add_special_tokens=False).ids
    with torch.no_grad():
        log_probs = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    expected = sum(log_probs[len(context) + t - 1, token] for t, token in enumerate(answer)).exp().item()
    assert row["correctness_before"] == pytest.approx(expected, rel=1e-4)
    assert row["episodes"][0]["end"] == len("is two")


def test_adapters_count(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(folder, tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "adapter")
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    results = {}
    for name, path in (("adapter", tmp_path / "adapter"), ("merged", tmp_path / "merged"), ("base", folder)):
        assert score(path, data, tmp_path / "out.jsonl", "--proxy_rank_ratio", "0.07", "--fisher_damping", "0.01") == 0
        results[name] = [episode["information"] for row in read(tmp_path / "out.jsonl") for episode in row["episodes"]]
    assert results["adapter"] == pytest.approx(results["merged"], rel=1e-3)
    assert results["adapter"] != pytest.approx(results["base"], rel=1e-2)


def test_page_is_written(folder, tmp_path):
    rows = rows_of_pieces()
    rows[0]["prompt"] = "<script>alert(1)</script>"
    page = tmp_path / "pages" / "page.html"
    assert score(folder, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--html", str(page)) == 0
    html = page.read_text()
    assert html.count("<article") == 4
    assert "<script" not in html


# ----- mistakes -----


GOOD = '{"prompt": "Add 1+1", "completion": "2", "answer": "2"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"completion": "2", "answer": "2"}', "`prompt` is missing"),
        ('{"prompt": "Add 1+1", "completion": "2"}', "`answer` is missing"),
        ('{"prompt": "Add 1+1", "completion": "2", "answer": null}', "`answer` is missing"),
        ('{"prompt": "Add 1+1", "completion": "2", "answer": " "}', "`answer` is empty"),
        ('{"prompt": "Add 1+1", "completion": "2", "answer": 2}', "`answer` must be a string, got 2"),
        ('{"prompt": "Add 1+1", "answer": "2"}', "`completion` (or `completion_ids`) is missing"),
        ('{"prompt": "Add 1+1", "completion": ["2"], "answer": "2"}', "`completion` must be a string"),
        ('{"prompt": "Add 1+1", "completion_ids": [1.5], "answer": "2"}', "`completion_ids` must be a list"),
        ('{"prompt": "Add 1+1", "completion_ids": [true], "answer": "2"}', "`completion_ids` must be a list"),
        ('{"prompt": "Add 1+1", "completion_ids": [-1], "answer": "2"}', "`completion_ids` must be a list"),
        ('{"prompt": "Add 1+1", "completion_ids": [99999], "answer": "2"}', "`completion_ids` holds 99999"),
        ('{"prompt": "", "completion": "2", "answer": "2"}', "`prompt` is empty"),
        ('{"prompt": [], "completion": "2", "answer": "2"}', "`prompt` is empty"),
        ('{"prompt": 7, "completion": "2", "answer": "2"}', "`prompt` must be a string or a list of messages"),
        ('{"prompt": [{"role": "user"}], "completion": "2", "answer": "2"}', "`prompt` must hold messages"),
        ('{"prompt": "Add \\ud800", "completion": "2", "answer": "2"}', "half of a surrogate pair"),
        ('{"prompt": "Add 1+1", "completion": "2", "answer": "2", "x": NaN}', "NaN is not JSON"),
    ],
)
def test_bad_rows_are_named_before_the_model_is_loaded(folder, tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    data = tmp_path / "in.jsonl"
    data.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert score(folder, data, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert f"--data {data}, line 3: " in error
    assert message in error
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_rows_can_be_dropped(folder, tmp_path, capsys):
    data = tmp_path / "in.jsonl"
    outside = GOOD.replace('"completion": "2"', '"completion_ids": [99999]')
    data.write_text("\n".join([GOOD, "nonsense", GOOD.replace("1+1", "2+2"), outside]))
    assert score(folder, data, tmp_path / "out.jsonl", "--on_bad_row", "drop") == 0
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == ["Add 1+1", "Add 2+2"]
    assert "dropped 2 rows (lines 2, 4)" in capsys.readouterr().err


def test_all_bad_rows_are_counted(folder, tmp_path, capsys):
    data = tmp_path / "in.jsonl"
    data.write_text("a\n" * 25)
    assert score(folder, data, tmp_path / "out.jsonl", "--on_bad_row", "drop") == 2
    error = capsys.readouterr().err
    assert "no row can be used" in error and "the first: not JSON" in error
    assert "25 rows (lines 1, 2, 3" in error and "20 and so on)" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b"", "there are no rows"),
        ("in.jsonl", b"\n \n", "there are no rows"),
        ("in.jsonl", b"\xff\xfe", "cannot be read"),
        ("missing.jsonl", None, "cannot be read"),
    ],
)
def test_data_that_cannot_be_read(folder, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert score(folder, tmp_path / name, tmp_path / "out.jsonl") == 2
    assert message in capsys.readouterr().err


def assert_one_line_error(capsys, *parts):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("l2t score: error")]
    for part in parts:
        assert part in line


def test_model_that_does_not_exist(tmp_path, capsys):
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    assert score(tmp_path / "nowhere", data, tmp_path / "out.jsonl") == 2
    assert_one_line_error(capsys, f"--model {tmp_path / 'nowhere'}: no such folder")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", "truncate", "is damaged or incomplete"),
        ("model.safetensors", "garbage", "is damaged or incomplete"),
        ("model.safetensors", "remove", "holds no .safetensors weights"),
        ("model.safetensors", "shrink", "its weights cannot be loaded"),
        ("config.json", "garbage", "config.json cannot be read"),
        ("config.json", "remove", "has no config.json"),
        ("config.json", "unknown", "configuration or tokenizer cannot be loaded"),
        ("tokenizer.json", "garbage", "configuration or tokenizer cannot be loaded"),
    ],
)
def test_damaged_model_folder(folder, tmp_path, capsys, file, damage, message):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    target = broken / file
    if damage == "remove":
        target.unlink()
    elif damage == "shrink":
        weights = load_file(target)
        weights["lm_head.weight"] = weights["lm_head.weight"][:9].clone()
        save_file(weights, target, metadata={"format": "pt"})
    else:
        contents = {"truncate": target.read_bytes()[:1000], "garbage": b"garbage", "unknown": b'{"model_type": "x"}'}
        target.write_bytes(contents[damage])
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    assert score(broken, data, tmp_path / "out.jsonl") == 2
    assert_one_line_error(capsys, f"--model {broken}", message)


def test_missing_weights_are_not_made_up(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    assert score(broken, data, tmp_path / "out.jsonl") == 2
    assert_one_line_error(capsys, "its weights are incomplete", "model.layers.1.mlp.up_proj.weight")


def test_weights_that_are_not_finite(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces()[:1])
    assert score(broken, data, tmp_path / "out.jsonl") == 2
    assert_one_line_error(capsys, f"--model {broken}: its weights are not finite, lm_head.weight")


def test_numbers_that_are_not_finite_name_the_row(folder, tmp_path, capsys, monkeypatch):
    from l2t_trl.scoring import Scores

    # As where float16 overflows.
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    correctness = Scores.correctness

    def overflow(self, answer_likelihood):
        values = correctness(self, answer_likelihood)
        return torch.where(values == values.nan_to_num().max(), torch.nan, values)

    monkeypatch.setattr(Scores, "correctness", overflow)
    assert score(folder, data, tmp_path / "out.jsonl") == 2
    assert_one_line_error(capsys, f"--data {data}, line ", "the model's numbers are not finite")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("option", ["--output", "--html"])
def test_output_that_cannot_be_written_is_found_first(folder, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out", tmp_path):
        assert score(folder, data, tmp_path / "out.jsonl", option, str(path)) == 2
        assert_one_line_error(capsys, f"{option} {path}")


def test_old_output_is_kept_when_scoring_fails(folder, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")

    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("l2t_trl.scoring.Scorer.score", fail)
    assert score(folder, data, output) == 130
    assert output.read_text() == "old\n"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_few_episodes_for_the_rank_are_warned_of(folder, tmp_path, capsys):
    data = write_rows(tmp_path / "in.jsonl", rows_of_pieces())
    assert score(folder, data, tmp_path / "out.jsonl", "--proxy_rank_ratio", "1") == 0
    assert "96 proxy coordinates rests on 10 episodes" in capsys.readouterr().err
    assert score(folder, data, tmp_path / "out.jsonl", "--proxy_rank_ratio", "0.07") == 0
    assert "proxy coordinates" not in capsys.readouterr().err


def test_completions_beyond_the_models_positions_are_warned_of(folder, tmp_path, capsys):
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    row = {"prompt": "1+1?", "completion": "2" * 20, "answer": "2"}
    data = write_rows(tmp_path / "in.jsonl", [row, row | {"completion": "2" * 37}])
    assert score(short, data, tmp_path / "out.jsonl") == 0
    assert "1 of 2 completions end beyond the 40 positions of the model, that of line 2" in capsys.readouterr().err
    assert score(folder, data, tmp_path / "out.jsonl") == 0
    assert "beyond" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--proxy_rank_ratio", "0"], "above 0 and at most 1"),
        (["--proxy_rank_ratio", "1.5"], "above 0 and at most 1"),
        (["--proxy_rank_ratio", "x"], "above 0 and at most 1"),
        (["--fisher_damping", "-1"], "a finite number, 0 or larger"),
        (["--compression_coef", "nan"], "a finite number, 0 or larger"),
        (["--process_reward_coef", "inf"], "a finite number, 0 or larger"),
        (["--max_episodes", "0"], "a whole number, 1 or larger"),
        (["--batch_size", "2.5"], "a whole number, 1 or larger"),
        (["--episode_format", "tag"], "invalid choice"),
        (["--answer_probe", ""], "not empty"),
        (["--answer_prob", "x"], "unrecognized arguments"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        score(tmp_path, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_options_have_the_trainers_names_and_defaults():
    import argparse

    from l2t_trl import L2TConfig
    from l2t_trl.scripts.score import TRAINER_OPTIONS, add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--model", "m", "--data", "d", "--output", "o"])
    defaults = {one.name: one.default for one in fields(L2TConfig)}
    for name in TRAINER_OPTIONS:
        assert getattr(args, name) == defaults[name], name


def test_help_is_complete_and_imports_no_torch():
    code = (
        "import sys, l2t_trl.cli as cli\n"
        "try:\n    cli.main(['score', '--help'])\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'trl', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    *text, modules = done.stdout.splitlines()
    assert ast.literal_eval(modules) == []
    options = "model data output html answer_probe answer_probe_end answer_likelihood episode_format max_episodes"
    options += " proxy_rank_ratio fisher_damping process_reward_coef compression_coef on_bad_row batch_size dtype"
    for name in options.split():
        assert any(line.startswith(f"  --{name} ") for line in text), name
