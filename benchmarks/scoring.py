r"""
Speed of the scoring pass: against the literal algorithm, by number of episodes, and against a plain forward pass.

    python benchmarks/scoring.py                                       # the three ratios
    python benchmarks/scoring.py --literal 0 --length 16384 --batch 1  # one long completion, without the literal twin

The literal algorithm is what the formulas say: a forward pass per cut for J, and a forward and full backward pass per
episode for g. Every ratio is the median of the rounds of one run, in which the contestants take turns.
"""

import argparse
import resource
import statistics
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from l2t_trl.proxy import proxy_bases, proxy_module_names
from l2t_trl.scoring import Scorer


def build_model(layers: int, width: int, vocabulary: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def make_batch(batch: int, length: int, episodes: int, vocabulary: int, probe: int, answer: int):
    generator = torch.Generator().manual_seed(0)

    def ids(rows, columns):
        return torch.randint(0, vocabulary, (rows, columns), generator=generator).tolist()

    ends = [round(length * 0.98 * (k + 1) / episodes) for k in range(episodes)]
    spans = [[*zip([0, *ends], [*ends, length], strict=True)] for _ in range(batch)]
    return ids(batch, 40), ids(batch, length), spans, ids(1, probe)[0], ids(batch, answer)


def literal(model, bases, prompts, completions, spans, probe, answers):
    """J by a forward per cut and g by a full backward per episode, one completion at a time."""
    modules = dict(model.named_modules())
    answer_log_probs, gradients = [], []
    for prompt, completion, row, answer in zip(prompts, completions, spans, answers, strict=True):
        for cut in [0, *(end for _, end in row[:-1])]:
            ids = torch.tensor([[*prompt, *completion[:cut], *probe, *answer]])
            with torch.no_grad():
                log_probs = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].log_softmax(-1)
            answer_log_probs.append(log_probs.gather(-1, ids[0, -len(answer) :, None]).sum())
        ids = torch.tensor([[*prompt, *completion]])
        for start, end in row:
            position = torch.arange(len(prompt) + start, len(prompt) + end)
            log_probs = model(ids).logits[0, position - 1].log_softmax(-1)
            model.zero_grad()
            log_probs.gather(-1, ids[0, position, None]).sum().backward()
            pieces = [torch.einsum("or,oi,ir->r", u, modules[name].weight.grad, v) for name, (u, v) in bases.items()]
            gradients.append(torch.cat(pieces))
    model.zero_grad()
    return torch.stack(answer_log_probs), torch.stack(gradients)


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=600, help="tokens per completion")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--probe", type=int, default=8, help="tokens of the probe")
    parser.add_argument("--answer", type=int, default=3, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--literal", type=int, default=1, help="rounds of the literal algorithm")
    args = parser.parse_args()

    model = build_model(args.layers, args.width, args.vocabulary)
    bases = proxy_bases(model, proxy_module_names(model), 0.05)
    scorer = Scorer(model, bases)
    scorer.check()
    many, few = (
        make_batch(args.batch, args.length, episodes, args.vocabulary, args.probe, args.answer) for episodes in (30, 5)
    )
    ids = torch.tensor([[*prompt, *completion] for prompt, completion in zip(*many[:2], strict=True)])

    def forward():
        with torch.no_grad():
            model(ids, use_cache=False)

    contestants = {
        "plain forward": forward,
        "scoring, K = 5": lambda: scorer.score(*few),
        "scoring, K = 30": lambda: scorer.score(*many),
    }
    times = {name: [] for name in contestants}
    for function in contestants.values():
        function()  # warm-up
    for _ in range(args.rounds):
        for name, function in contestants.items():
            times[name].append(seconds(function))
    report = sys.stdout.write
    report(f"{args.batch} completions of {args.length} tokens, {args.layers} layers of width {args.width}, ")
    report(f"vocabulary {args.vocabulary}, {torch.get_num_threads()} threads, fp32\n")
    for name, values in times.items():
        report(f"{name:18} {statistics.median(values):8.3f} s   (min {min(values):.3f}, max {max(values):.3f})\n")

    def ratio(above, below):
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    report(f"K = 30 / K = 5           {ratio('scoring, K = 30', 'scoring, K = 5'):6.2f}\n")
    report(f"K = 30 / plain forward   {ratio('scoring, K = 30', 'plain forward'):6.2f}\n")
    for _ in range(args.literal):
        start = time.perf_counter()
        answer_log_probs, gradients = literal(model, bases, *many)
        elapsed = time.perf_counter() - start
        scores = scorer.score(*many)
        report(
            f"literal / scoring        {elapsed / statistics.median(times['scoring, K = 30']):6.1f}   ({elapsed:.1f} s)\n"
        )
        error = (scores.answer_log_probs.flatten() - answer_log_probs).abs().max() / answer_log_probs.abs().max()
        report(f"largest relative difference of log J {error:.1e}, ")
        error = (scores.gradients.flatten(0, 1) - gradients).abs().max() / gradients.abs().max()
        report(f"of g {error:.1e}\n")
    report(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB\n")


if __name__ == "__main__":
    main()
