"""One scoring pass against separate forwards for every cut and a full backward for every episode."""

import random
import warnings
from contextlib import contextmanager

import pytest
import torch

import literal
import models
from l2t_trl import scoring
from l2t_trl.proxy import effective_weight, proxy_module_names
from l2t_trl.scoring import Scorer


# fp32 sums in another order: both sides carry errors of a few 1e-7 of the largest term.
TOLERANCE = 1e-5
RANK = 3


def ids(source: random.Random, length: int) -> list[int]:
    return [source.randrange(models.VOCABULARY_SIZE) for _ in range(length)]


def make_batch(seed: int = 0) -> dict:
    """Seven rows that differ in everything: lengths, number of episodes, length of the answer."""
    source = random.Random(seed)
    rows = [
        # (prompt tokens, spans, answer tokens)
        (5, [(0, 6), (6, 11), (11, 24), (24, 29), (29, 36)], 3),
        (11, [(0, 3), (3, 14), (14, 17)], 1),
        (2, [(0, 20), (20, 23)], 2),  # K = 1: no tags
        (7, [(0, 4), (4, 9), (9, 9)], 1),  # truncated: the answer span is empty
        (4, [(0, 0)], 4),  # an empty completion
        (1, [(0, 1), (1, 1)], 2),  # one token
        (6, [(0, 2), (2, 40), (40, 41), (41, 48)], 5),  # one long episode, one of a single token
    ]
    return {
        "prompt_ids": [ids(source, length) for length, _, _ in rows],
        "completion_ids": [ids(source, spans[-1][1]) for _, spans, _ in rows],
        "spans": [spans for _, spans, _ in rows],
        "probe_ids": ids(source, 3),
        "answer_ids": [ids(source, length) for _, _, length in rows],
    }


def rows_of(batch: dict):
    columns = (batch[key] for key in ("prompt_ids", "completion_ids", "spans", "answer_ids"))
    return list(zip(*columns, strict=True))


def select(batch: dict, order) -> dict:
    return {key: value if key == "probe_ids" else [value[i] for i in order] for key, value in batch.items()}


def plain_model(model):
    return model.get_base_model() if hasattr(model, "peft_config") else model


def bases_of(model, pattern: str | None = None, rank: int = RANK) -> dict:
    return literal.proxy_bases(plain_model(model), proxy_module_names(model, pattern), rank)


def assert_near(actual, expected, tolerance: float = TOLERANCE):
    """Equal relative to the largest entry: single entries may be 0 by cancellation."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def assert_scores_near(scores, expected, tolerance: float = TOLERANCE):
    assert_near(scores.log_probs, expected.log_probs, tolerance)
    assert torch.equal(scores.answer_log_probs.isnan(), expected.answer_log_probs.isnan())
    assert_near(scores.answer_log_probs.nan_to_num(), expected.answer_log_probs.nan_to_num(), tolerance)
    assert torch.equal(scores.answer_lengths, expected.answer_lengths)
    assert_near(scores.gradients, expected.gradients, tolerance)


def assert_literal(model, bases, batch: dict, scores, tolerance: float = TOLERANCE):
    """Compare all that the pass returned, padding included, with the literal algorithm."""
    model = plain_model(model)
    rows = rows_of(batch)
    num_spans, num_tokens = max(len(spans) for spans in batch["spans"]), max(map(len, batch["completion_ids"]))
    size = sum(u.shape[1] for u, _ in bases.values())
    assert scores.log_probs.shape == (len(rows), num_tokens)
    assert scores.answer_log_probs.shape == (len(rows), num_spans)
    assert scores.gradients.shape == (len(rows), num_spans, size)
    assert scores.answer_lengths.tolist() == [len(answer) for answer in batch["answer_ids"]]
    for i, (prompt, completion, spans, answer) in enumerate(rows):
        with torch.no_grad():
            log_probs = literal.token_log_probs(model, prompt, completion)
        assert_near(scores.log_probs[i, : len(completion)], log_probs, tolerance)
        assert (scores.log_probs[i, len(completion) :] == 0).all()
        at_cuts = literal.answer_log_probs(model, prompt, completion, spans, batch["probe_ids"], answer)
        assert len(at_cuts) == len(spans)  # K + 1 cuts, K + 1 spans
        assert_near(scores.answer_log_probs[i, : len(spans)], at_cuts, tolerance)
        assert scores.answer_log_probs[i, len(spans) :].isnan().all()
        gradients = literal.proxy_gradients(model, prompt, completion, spans, bases)
        assert_near(scores.gradients[i, : len(spans)], gradients, tolerance)
        assert (scores.gradients[i, len(spans) :] == 0).all()
    assert all(
        tensor.dtype == torch.float32 for tensor in (scores.log_probs, scores.answer_log_probs, scores.gradients)
    )


@contextmanager
def forbidden(path: str):
    def refuse(*args):
        raise AssertionError(f"took {path}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, path, refuse)
        yield


# ----- the numbers -----


@pytest.mark.parametrize("name", models.DENSE)
def test_dense_models_equal_the_literal_algorithm(name):
    model, batch = models.build(name), make_batch()
    bases = bases_of(model)
    assert len(bases) == 3
    scorer = Scorer(model, bases)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no slow path
        scorer.check()
    with forbidden("_full_gradients"):
        scores = scorer.score(**batch)
    assert_literal(model, bases, batch, scores)


@pytest.mark.parametrize("name", models.ODD)
def test_odd_models_are_slow_or_refused_but_never_wrong(name):
    refused = {"gpt2_conv1d", "qwen2_moe", "mixtral"}
    fast = {"phi3_fused", "starcoder2"}
    model, batch = models.build(name), make_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            bases = bases_of(model)
            scorer = Scorer(model, bases)
            scorer.check()
        except ValueError as error:
            assert type(model).__name__ in str(error) and len(str(error)) > 60
            assert name in refused, error
            return
        scores = scorer.score(**batch)
        scorer.score(**batch)
    assert name not in refused
    messages = [str(warning.message) for warning in caught if "backward pass" in str(warning.message)]
    assert len(messages) == (0 if name in fast else 1)
    assert_literal(model, bases, batch, scores)


def test_a_tail_found_wrong_stays_given_up_when_the_bases_are_refreshed():
    model, batch = models.build("granite"), select(make_batch(), [1])
    bases = bases_of(model)
    scorer = Scorer(model, bases)
    with pytest.warns(UserWarning, match="backward pass"):
        scorer.check()
    scorer.set_bases(bases)
    assert_literal(model, bases, batch, scorer.score(**batch))


@pytest.mark.parametrize("name", ["granite", "cohere2_parallel"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.1])  # of the weights: 0.1 is the library's initialisation, 0.02
def test_a_wrong_tail_is_found_in_half_precision_too(name, scale):
    model, batch = models.build(name), select(make_batch(), [0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim >= 2 else 1)
    scorer = Scorer(model.bfloat16(), bases_of(model))
    with pytest.warns(UserWarning, match="backward pass"):
        scorer.check()
    with forbidden("_tail_gradients"):
        scorer.score(**batch)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_weights_and_tokens(seed):
    model, batch = models.build("qwen2_untied", seed), make_batch(seed)
    bases = bases_of(model, rank=5)
    assert_literal(model, bases, batch, Scorer(model, bases).score(**batch))


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_tied"])
def test_lora_counts_with_its_adapters(name):
    model, batch = models.build_lora(name=name), make_batch()
    names = proxy_module_names(model)
    assert len(names) == 3
    bases = bases_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = Scorer(model, bases)
        scorer.check()
    scores = scorer.score(**batch)
    assert_literal(model, bases, batch, scores)
    with model.disable_adapter():  # the adapters matter
        without = Scorer(model, bases).score(**batch)
    assert (without.log_probs - scores.log_probs).abs().max() > 0.1


def test_lora_equals_the_merged_model():
    model, batch = models.build_lora(), make_batch()
    bases = bases_of(model)
    scores = Scorer(model, bases).score(**batch)
    merged = model.merge_and_unload()
    assert_scores_near(Scorer(merged, bases).score(**batch), scores)


@pytest.mark.parametrize("name", ["qwen2_untied", "gemma2"])
@pytest.mark.parametrize(
    "pattern", [r"model\.layers\.[01]\.self_attn\.[qo]_proj", r".*\.0\.mlp\.down_proj|.*2\.mlp\.up_proj"]
)
def test_proxies_elsewhere_take_the_slow_path_with_the_same_meaning(name, pattern):
    model, batch = models.build(name), make_batch()
    bases = bases_of(model, pattern)
    scorer = Scorer(model, bases)
    with pytest.warns(UserWarning, match="backward pass"):
        scorer.check()
    assert_literal(model, bases, batch, scorer.score(**batch))


def test_slow_and_fast_path_agree():
    model, batch = models.build("qwen2_biases"), make_batch()
    scorer = Scorer(model, bases_of(model))
    fast = scorer.score(**batch)
    scorer._in_tail = False
    assert_scores_near(scorer.score(**batch), fast)


def test_some_modules_of_the_last_mlp():
    model, batch = models.build("qwen2_untied"), select(make_batch(), [0, 3])
    bases = bases_of(model, r"model\.layers\.2\.mlp\.down_proj")
    with forbidden("_full_gradients"):
        assert_literal(model, bases, batch, Scorer(model, bases).score(**batch))


def test_order_of_the_bases_is_the_order_of_the_coordinates():
    model, batch = models.build("qwen2_untied"), select(make_batch(), [0])
    bases = bases_of(model)
    backwards = dict(reversed(bases.items()))
    gradients = Scorer(model, bases).score(**batch).gradients
    other = Scorer(model, backwards).score(**batch).gradients
    assert_near(torch.cat([other[..., 6:], other[..., 3:6], other[..., :3]], dim=-1), gradients)


def test_gradient_is_the_slope_along_a_singular_value():
    # theta_i is a singular value: moving it by h changes log pi(z_k) by h g_i (central difference, in float64).
    model, batch = models.build("llama"), select(make_batch(), [1])
    bases = bases_of(model)
    gradients = Scorer(model, bases).score(**batch).gradients[0]
    (prompt, completion, spans, _), model = rows_of(batch)[0], model.double()
    for entry, (name, i) in enumerate((name, i) for name in bases for i in range(RANK)):
        u, v = (basis[:, i].double() for basis in bases[name])
        weight, values = model.get_submodule(name).weight, []
        for h in (1e-3, -1e-3):
            with torch.no_grad():
                weight += h * torch.outer(u, v)
                values.append(literal.token_log_probs(model, prompt, completion))
                weight -= h * torch.outer(u, v)
        slopes = [((values[0] - values[1])[start:end].sum() / 2e-3).item() for start, end in spans]
        torch.testing.assert_close(gradients[:, entry].double(), torch.tensor(slopes).double(), rtol=1e-3, atol=1e-3)


def test_without_bases_there_are_no_gradients():
    model, batch = models.build("qwen2_untied"), make_batch()
    expected = Scorer(model, bases_of(model)).score(**batch)
    scores = Scorer(model).score(**batch)
    assert scores.gradients is None
    assert_near(scores.log_probs, expected.log_probs)
    assert_near(scores.answer_log_probs.nan_to_num(), expected.answer_log_probs.nan_to_num())


def test_correctness_joint_and_per_token():
    # 3 answer tokens of joint log-probability log(1/8): joint 1/8, geometric mean 1/2.
    scores = scoring.Scores(
        log_probs=torch.zeros(1, 1),
        answer_log_probs=torch.tensor([[0.125, 1.0, torch.nan]]).log(),
        answer_lengths=torch.tensor([3]),
        gradients=None,
    )
    torch.testing.assert_close(scores.correctness("joint"), torch.tensor([[0.125, 1, torch.nan]]), equal_nan=True)
    torch.testing.assert_close(scores.correctness("per_token"), torch.tensor([[0.5, 1, torch.nan]]), equal_nan=True)


# ----- batches -----


@pytest.mark.parametrize("name", ["qwen2_untied", "mistral_window", "gemma2"])
def test_batch_size_changes_nothing(name):
    model, batch = models.build(name), make_batch()
    scorer = Scorer(model, bases_of(model))
    expected = scorer.score(**batch)
    for batch_size in (1, 2, 3, 5, 100):
        assert_scores_near(scorer.score(**batch, batch_size=batch_size), expected)


def test_permuted_batch_permutes_the_scores():
    model, batch = models.build("qwen2_untied"), make_batch()
    scorer = Scorer(model, bases_of(model))
    scores, order = scorer.score(**batch), [3, 0, 6, 5, 1, 4, 2]
    permuted = scorer.score(**select(batch, order), batch_size=2)
    scores = scoring.Scores(
        scores.log_probs[order],
        scores.answer_log_probs[order],
        scores.answer_lengths[order],
        scores.gradients[order],
    )
    assert_scores_near(permuted, scores)


def test_small_chunks_change_nothing_and_bound_the_lm_head(monkeypatch):
    model, batch = models.build("gemma2"), make_batch()
    scorer = Scorer(model, bases_of(model))
    expected = scorer.score(**batch)
    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", 1)
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel()))
    scores = scorer.score(**batch)
    handle.remove()
    num_tokens = sum(map(len, batch["completion_ids"]))
    assert max(rows) < num_tokens * models.VOCABULARY_SIZE / 5  # never (B x T, V)
    assert_scores_near(scores, expected)


def test_number_of_forwards_does_not_depend_on_the_episodes():
    model, batch = models.build("qwen2_untied"), make_batch()
    scorer = Scorer(model, bases_of(model))
    one_episode = {**batch, "spans": [[(0, n), (n, n)] if n else [(0, 0)] for n in map(len, batch["completion_ids"])]}
    counts = []
    for each in (batch, one_episode):
        calls = []
        handle = model.model.layers[0].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        scorer.score(**each, batch_size=3)
        handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1] == 2 * 3  # two phases, ceil(7 / 3) batches


def test_only_empty_completions():
    model, batch = models.build("qwen2_untied"), select(make_batch(), [4, 4])
    bases = bases_of(model)
    scores = Scorer(model, bases).score(**batch)
    assert scores.log_probs.shape == (2, 0)
    assert_literal(model, bases, batch, scores)


def test_an_episode_without_tokens_has_no_gradient():
    # An answer span (T, T), scored beside the same tokens split otherwise: sums over spans agree.
    model, batch = models.build("qwen2_untied"), select(make_batch(), [0])
    scorer = Scorer(model, bases_of(model))
    whole = {**batch, "spans": [[(0, 36), (36, 36)]]}
    split, joined = scorer.score(**batch).gradients, scorer.score(**whole).gradients
    assert (joined[0, 1] == 0).all()
    assert_near(split.sum(1), joined.sum(1))


@pytest.mark.parametrize("column", ["prompt_ids", "answer_ids", "probe_ids"])
def test_rows_without_a_token_are_refused(column):
    model, batch = models.build("qwen2_untied"), make_batch()
    batch[column] = [] if column == "probe_ids" else [*batch[column][:2], [], *batch[column][3:]]
    with pytest.raises(ValueError, match=f"{column.split('_')[0]}.*row {0 if column == 'probe_ids' else 2}"):
        Scorer(model).score(**batch)


# ----- precision and attention -----


@pytest.mark.parametrize("name", ["qwen2_untied", "mistral_window", "gemma3", "llama_biases"])
def test_eager_and_sdpa_agree(name):
    batch, eager = make_batch(), models.build(name, attn_implementation="eager")
    sdpa = models.build(name, attn_implementation="sdpa")
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    bases = bases_of(eager)
    scores = Scorer(eager, bases).score(**batch)
    assert_scores_near(Scorer(sdpa, bases).score(**batch), scores)
    assert_literal(eager, bases, batch, scores)


def test_attention_that_soft_caps_is_never_scored_without_the_cap():
    # SDPA ignores Gemma 2's cap: the two phases would see two models.
    model = models.build("gemma2", attn_implementation="sdpa")
    bases, batch = bases_of(model), make_batch()
    scorer = Scorer(model, bases)
    try:
        scorer.check()
    except ValueError as error:
        assert "eager" in str(error)
    else:
        assert_literal(model, bases, batch, scorer.score(**batch))


@pytest.mark.parametrize(
    ("name", "implementation", "expected"),
    [
        ("qwen2_untied", "flash_attention_2", "sdpa"),  # flash attention takes no mask of one's own
        ("qwen2_untied", "eager", "eager"),
        ("gemma2", "flash_attention_2", "eager"),  # it caps scores, which SDPA does not
    ],
)
def test_attention_of_the_probes(name, implementation, expected):
    model = models.build(name)
    model.config._attn_implementation = implementation
    with pytest.raises(Interrupted), scoring._masked_attention(model, model.config):
        assert model.config._attn_implementation == expected
        raise Interrupted
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["qwen2_untied", "gemma2"])
def test_bf16_stays_close(name):
    batch, model = make_batch(), models.build(name)
    bases = bases_of(model)
    expected = Scorer(model, bases).score(**batch)
    scorer = Scorer(model.bfloat16(), bases)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.check()
    scores = scorer.score(**batch)
    assert scores.log_probs.dtype == scores.gradients.dtype == torch.float32
    # 8 bits of mantissa over 3 layers: about 1 % of logits of size 5, and more where an activation nearly cancels.
    assert (scores.log_probs - expected.log_probs).abs().mean() < 0.03
    assert (scores.log_probs - expected.log_probs).abs().max() < 0.4
    difference = (scores.answer_log_probs - expected.answer_log_probs).nan_to_num().abs().max()
    assert difference < 0.4  # sums over up to five tokens
    cosine = torch.cosine_similarity(scores.gradients.flatten(), expected.gradients.flatten(), dim=0)
    assert cosine > 0.998


def test_temperature_of_sampling_is_not_read():
    model, batch = models.build("qwen2_untied"), select(make_batch(), [0])
    expected = Scorer(model).score(**batch)
    model.generation_config.temperature = 0.3
    assert torch.equal(Scorer(model).score(**batch).log_probs, expected.log_probs)


# ----- nothing is left behind -----


def snapshot(model) -> dict:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parameters = dict(model.named_parameters())
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: tensor.clone() for name, tensor in model.named_buffers()},
        "grads": {name: (id(p.grad), p.grad if p.grad is None else p.grad.clone()) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "pointers": {name: p.data_ptr() for name, p in parameters.items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [list(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "config": dict(vars(model.config)) | {"id": id(model.config)},
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "torch_rng": torch.get_rng_state(),
        "python_rng": random.getstate(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    assert type(before) is type(after)
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, list | tuple):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


def well_used_model(build=models.build, *args, **overrides):
    """In training, with dropout, some modules in evaluation mode, some frozen, some with gradients."""
    model = build(*args, **overrides).train()
    plain = plain_model(model)
    plain.model.layers[1].eval()
    plain.model.layers[2].mlp.act_fn.eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
    return model


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_tied", "gemma2", "granite", "mistral_window"])
def test_nothing_changes(name):
    model, batch = well_used_model(models.build, name, attention_dropout=0.5), make_batch()
    scorer = Scorer(model, bases_of(model))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer.check()
    assert_same(before, snapshot(model))
    scores = scorer.score(**batch, batch_size=3)
    assert_same(before, snapshot(model))
    # Dropout is off: the numbers are those of evaluation mode.
    assert_literal(model.eval(), scorer.bases, batch, scores)


def test_nothing_changes_with_lora():
    model, batch = well_used_model(models.build_lora), make_batch()
    scorer = Scorer(model, bases_of(model))
    before = snapshot(model)
    scorer.check()
    scorer.score(**batch)
    assert_same(before, snapshot(model))


def test_gradient_checkpointing_changes_nothing():
    batch, model = make_batch(), models.build("qwen2_untied", attention_dropout=0.5)
    scorer = Scorer(model, bases_of(model))
    expected = scorer.score(**batch)
    model.gradient_checkpointing_enable()
    model.train()
    before = snapshot(model)
    assert_scores_near(scorer.score(**batch), expected)
    assert_same(before, snapshot(model))
    assert model.is_gradient_checkpointing


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["qwen2_untied", "granite"])
@pytest.mark.parametrize("where", ["activation", "attention", "lm_head", "autograd"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_nothing_changes_when_it_raises_midway(name, where, call, monkeypatch):
    # By call: phase one, phase two, the tail (or slow path), the second batch.
    model, batch = well_used_model(models.build, name, attention_dropout=0.5), make_batch()
    scorer = Scorer(model, bases_of(model))
    scorer._in_tail = scorer._in_tail and name != "granite"
    before, layer, calls = snapshot(model), model.model.layers[-1], []

    def interrupt(function):
        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise Interrupted
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if where == "autograd":
            patch.setattr(torch.autograd, "grad", interrupt(torch.autograd.grad))
        else:
            modules = {"activation": layer.mlp.act_fn, "attention": layer.self_attn.o_proj, "lm_head": model.lm_head}
            module = modules[where]
            patch.setattr(type(module), "forward", interrupt(type(module).forward))
        with pytest.raises(Interrupted):
            scorer.score(**batch, batch_size=2)
    assert_same(before, snapshot(model))


def test_scoring_under_no_grad_and_grad_agree():
    model, batch = models.build("qwen2_untied"), select(make_batch(), [0, 1])
    scorer = Scorer(model, bases_of(model))
    with torch.no_grad():
        expected = scorer.score(**batch)
    scores = scorer.score(**batch)
    assert_scores_near(scores, expected)
    assert not any(t.requires_grad for t in (scores.log_probs, scores.answer_log_probs, scores.gradients))


# ----- which modules, which weights -----


def test_default_proxy_is_the_last_mlp():
    expected = {f"model.layers.2.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(proxy_module_names(models.build("qwen2_untied"))) == expected
    assert set(proxy_module_names(models.build_lora())) == expected  # names inside the PEFT wrapper


def test_proxy_by_regular_expression_matches_whole_names():
    model = models.build("qwen2_untied")
    assert proxy_module_names(model, r"model\.layers\.1\.mlp\.up_proj") == ["model.layers.1.mlp.up_proj"]
    for pattern in ("up_proj", r"model\.layers\.35\..*", "2"):  # a part of a name matches nothing
        with pytest.raises(ValueError, match="matches no linear layer") as error:
            proxy_module_names(model, pattern)
        assert "model.layers.2.mlp.gate_proj" in str(error.value)


def test_random_share_of_the_layers():
    model = models.build("qwen2_untied")
    names = proxy_module_names(model, "random:0.34", seed=1)  # round(0.34 * 3) = 1 layer: 4 attention + 3 MLP
    assert len(names) == 7 and len({name.split(".")[2] for name in names}) == 1
    assert names == proxy_module_names(model, "random:0.34", seed=1)
    chosen = {proxy_module_names(model, "random:0.34", seed=seed)[0].split(".")[2] for seed in range(20)}
    assert chosen == {"0", "1", "2"}
    assert len(proxy_module_names(model, "random:1")) == 21
    assert len(proxy_module_names(model, "random:0.01")) == 7  # at least one
    for bad in ("random:0", "random:1.5", "random:x", "random:"):
        with pytest.raises(ValueError, match="random"):
            proxy_module_names(model, bad)


def test_mixture_of_experts_is_refused_with_a_way_out():
    model, batch = models.build("qwen2_moe"), select(make_batch(), [0, 2])
    with pytest.raises(ValueError, match="mixture of experts.*proxy_modules"):
        proxy_module_names(model)
    bases = bases_of(model, r"model\.layers\.2\.self_attn\.o_proj")
    scorer = Scorer(model, bases)
    with pytest.warns(UserWarning, match="backward pass"):
        scorer.check()
    assert_literal(model, bases, batch, scorer.score(**batch))


@pytest.mark.parametrize("adapters", [("default",), ("default", "other")])
def test_effective_weight_of_lora(adapters):
    model = models.build_lora(adapters=adapters).get_base_model()
    name = "model.layers.2.mlp.down_proj"
    if len(adapters) > 1:
        model.get_submodule(name).set_adapter(list(adapters))
    weight = effective_weight(model.get_submodule(name))
    assert_near(weight, literal.effective_weight(model, name))
    base = literal.plain_layer(model, name).weight
    assert (weight - base).abs().max() > 0.01
    assert not weight.requires_grad


def test_effective_weight_of_merged_lora_is_not_merged_twice():
    model = models.build_lora()
    layer = model.get_base_model().get_submodule("model.layers.2.mlp.down_proj")
    expected = effective_weight(layer)
    model.merge_adapter()
    assert_near(effective_weight(layer), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_near(effective_weight(layer), layer.get_base_layer().weight.detach())


def test_prompt_learning_is_refused():
    # Its virtual tokens are in no base model: J would silently be that of another policy.
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        models.build("qwen2_untied"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(ValueError, match="prompt|virtual"):
        Scorer(model)
