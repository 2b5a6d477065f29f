"""
`l2t eval`: measure a model on benchmarks.

Nothing heavy is imported at the top, so that `l2t eval --help` answers at once.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from .options import add_trainer_options, coefficient, count, share, whole_number
from .score import DTYPES, find_model, load_tokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..evaluation.benchmark_run import Task


MAX_TOKENS = 16384  # the paper's budget
# vLLM works on as many as fit and takes the next from the batch, so that a larger one keeps a GPU busier; on a CPU it
# would only be minutes before anything is written.
BATCH_SIZE, VLLM_BATCH_SIZE = 32, 256
ASKING_OPTIONS = ("answer_probe", "episode_format", "max_episodes")
SETTINGS, DEPTH_SETTINGS, METRICS, TABLE = "settings.json", "depth_settings.json", "metrics.json", "results.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "For every benchmark the output folder gets a folder with completions.jsonl (written as they come),\n"
        "settings.json and metrics.json; results.md has the table of all of them. The same command goes on where a\n"
        "killed one was, and only computes the numbers anew where nothing is left to do; other settings need\n"
        "another folder.\n\n"
        "Every completion has random numbers of its own, given by the seed. The same settings give the same\n"
        "completions on one machine, interrupted or not; another batch size, machine or engine rounds otherwise."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model folder (adapters too), Hub id, tiny or smollm2"
    )
    parser.add_argument(
        "--benchmark", required=True, metavar="NAME[,NAME]", help="benchmarks; an unknown name lists them"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the results (default: outputs/eval/NAME-OF-MODEL)")
    numbers = {"type": count, "metavar": "NUMBER"}
    parser.add_argument("--samples", **numbers, default=20, help="completions per question (default: 20)")
    parser.add_argument(
        "--max_tokens", **numbers, help=f"longest completion (default: {MAX_TOKENS}, or what the model takes)"
    )
    parser.add_argument("--limit", **numbers, help="only the first so many questions of each benchmark")
    parser.add_argument(
        "--temperature", type=coefficient, default=0.6, metavar="NUMBER", help="0 decodes greedily (default: 0.6)"
    )
    parser.add_argument(
        "--top_p", type=share, default=0.95, metavar="NUMBER", help="share that is sampled from (default: 0.95)"
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="NUMBER", help="default: 0")
    parser.add_argument(
        "--batch_size",
        **numbers,
        help="completions made and written together "
        f"(default: {BATCH_SIZE}; {VLLM_BATCH_SIZE} with --vllm on a GPU, which splits them as it likes)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type the model is loaded in (default: bfloat16, float32 without a GPU)"
    )
    parser.add_argument("--system_prompt", metavar="TEXT", help="system message in front of every question")
    parser.add_argument("--instruction", metavar="TEXT", help="text behind every question instead of the benchmark's")
    parser.add_argument("--vllm", action="store_true", help="generate with vLLM, in this process")
    parser.add_argument(
        "--vllm_gpu_memory_utilization",
        type=share,
        default=0.8,
        metavar="NUMBER",
        help="share of the GPU's memory that vLLM takes (default: 0.8)",
    )
    parser.add_argument(
        "--vllm_tensor_parallel_size", **numbers, default=1, help="GPUs that vLLM spreads the model over (default: 1)"
    )
    curves = parser.add_argument_group("curves, from the stored completions")
    curves.add_argument(
        "--budget_curve", "--budget-curve", action="store_true", help="accuracy against the token budget"
    )
    curves.add_argument(
        "--depth_curve",
        "--depth-curve",
        action="store_true",
        help="accuracy, maj@4 and tokens against the number of episodes: completions are cut behind each episode and "
        "asked for the answer",
    )
    curves.add_argument(
        "--depth_answers", **numbers, default=4, help="answers sampled at every cut (default: 4; maj@4 needs them)"
    )
    curves.add_argument("--answer_tokens", **numbers, default=32, help="longest of them (default: 32)")
    add_trainer_options(curves, ASKING_OPTIONS, episode_format="auto")


def main(args: argparse.Namespace) -> int:
    """
    Run the command.

    Raises:
        UserError: if a setting, the model, the data or the output cannot be used; before the model is loaded, if that
            can be told.
    """
    # What takes no model is checked before one is loaded, the quick before the slow.
    from ..data.benchmarks import get_benchmark

    names = dict.fromkeys(name.strip() for name in args.benchmark.split(","))
    benchmarks = [get_benchmark(name) for name in names]
    from .train import check_output_dir, quieten_vllm

    quieten_vllm()
    output = Path(args.output or Path("outputs", "eval", Path(args.model.rstrip("/")).name))
    try:
        check_output_dir(str(output))
    except UserError as error:
        raise UserError(str(error).replace("output_dir", "--output")) from error
    if args.vllm:
        from trl.import_utils import is_vllm_available

        if not is_vllm_available():
            raise UserError("--vllm is set, but vLLM is not installed: make install VLLM=1, or leave --vllm out.")
    model_path = find_model(args.model)
    tokenizer, _ = load_tokenizer(model_path)

    from ..evaluation.benchmark_run import prepare, results_table

    tasks = []
    for benchmark in benchmarks:
        task = prepare(benchmark, tokenizer, args.limit, args.system_prompt, args.instruction)
        if args.limit is None and len(task.rows) != benchmark.num_rows:
            _say(f"{benchmark.name}: {len(task.rows)} questions where {benchmark.num_rows} are expected.")
        if args.depth_curve and not task.has_answers:
            raise UserError(f"--depth_curve: {benchmark.name} has no answers in words that could be asked for.")
        tasks.append(task)
    run = _Run(args, model_path, tokenizer, tasks)
    for task in tasks:
        run.keep_settings(task, output / task.name)
    results = [run.measure(task, output / task.name) for task in tasks]

    from ..evaluation.journal import write_result

    table = results_table(_stored_results(output))
    write_result(output / TABLE, table)
    print(results_table(results), end="")
    print(f"Completions, metrics.json and {TABLE}: {output.absolute()}")
    return 0


class _Run:
    """What the benchmarks of one command share: model, tokenizer, settings, and the engine once it is needed."""

    def __init__(
        self, args: argparse.Namespace, model_path: str, tokenizer: "PreTrainedTokenizerBase", tasks: "list[Task]"
    ):
        import torch
        from transformers import AutoConfig

        from ..evaluation.benchmark_run import Sampling, model_fingerprint
        from ..evaluation.depth import Asking

        self.args, self.model_path, self.tokenizer = args, model_path, tokenizer
        has_gpu = torch.cuda.is_available()
        self.dtype = args.dtype or ("bfloat16" if has_gpu else "float32")
        adapter = Path(model_path, "adapter_config.json")
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else model_path
        self.positions = getattr(
            AutoConfig.from_pretrained(base).get_text_config(decoder=True), "max_position_embeddings", None
        )
        self.asking = Asking(*(getattr(args, name) for name in ASKING_OPTIONS), args.depth_answers, args.answer_tokens)
        probe_ids = tokenizer(args.answer_probe, add_special_tokens=False)["input_ids"]
        if not probe_ids:
            raise UserError(f"--answer_probe {args.answer_probe!r}: the model's tokenizer makes no token of it.")
        self.num_more = len(probe_ids) + args.answer_tokens
        self.longest_prompt = max(len(ids) for task in tasks for ids in task.prompts)
        self.sampling = Sampling(
            samples=args.samples,
            max_tokens=self._max_tokens(),
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            batch_size=args.batch_size or (VLLM_BATCH_SIZE if args.vllm and has_gpu else BATCH_SIZE),
        )
        self.fingerprint = model_fingerprint(model_path)

    def _max_tokens(self) -> int:
        """The longest completion: as asked for, or what the model has room for."""
        if self.positions is None:
            return self.args.max_tokens or MAX_TOKENS
        room = self.positions - self.longest_prompt
        if self.args.max_tokens is None:
            # Room for probe and answer, so that the depth curve can be asked for later.
            if room - self.num_more < 1:
                raise UserError(
                    f"--benchmark: the longest prompt has {self.longest_prompt} tokens, which leaves no room in the "
                    f"model's {self.positions}. Set --max_tokens to {room} at most, or another model."
                )
            return min(MAX_TOKENS, room - self.num_more)
        others = f"the longest prompt ({self.longest_prompt} tokens)"
        if self.args.depth_curve:
            room -= self.num_more
            others += f" and what asks for the answer ({self.num_more})"
        if self.args.max_tokens > room:
            raise UserError(
                f"--max_tokens {self.args.max_tokens}: with {others} that is more than the model's {self.positions} "
                f"positions. Set {room} at most, or leave it out."
            )
        return self.args.max_tokens

    @functools.cached_property
    def engine(self):
        """The engine, made when it is first asked for."""
        if not self.args.vllm:
            from ..evaluation.engines import TransformersEngine

            return TransformersEngine(self.model_path, self.tokenizer, self.dtype)
        from ..evaluation.engines import VllmEngine

        _say("Starting vLLM ...")
        length = self.longest_prompt + self.sampling.max_tokens + self.num_more
        return VllmEngine(
            self.model_path,
            self.tokenizer,
            self.dtype,
            max_length=length if self.positions is None else min(length, self.positions),
            num_sequences=min(self.sampling.batch_size, VLLM_BATCH_SIZE),
            memory_share=self.args.vllm_gpu_memory_utilization,
            num_gpus=self.args.vllm_tensor_parallel_size,
        )

    def keep_settings(self, task: "Task", folder: Path) -> None:
        """Write the settings, or check that they are those of the results that are there."""
        from ..evaluation.benchmark_run import settings_of
        from ..evaluation.journal import keep_settings

        settings = settings_of(
            self.sampling,
            task,
            model=self.args.model,
            weights=self.fingerprint,
            engine="vllm" if self.args.vllm else "transformers",
            dtype=self.dtype,
            system_prompt=self.args.system_prompt,
            instruction=task.benchmark.instruction if self.args.instruction is None else self.args.instruction,
        )
        keep_settings(folder / SETTINGS, settings)
        if self.args.depth_curve:
            keep_settings(folder / DEPTH_SETTINGS, vars(self.asking))

    def measure(self, task: "Task", folder: Path) -> dict[str, Any]:
        """Do what is left of a benchmark, and write and return its numbers."""
        from ..evaluation.benchmark_run import budget_curve, evaluation_of, metrics_of, sample_task
        from ..evaluation.journal import write_result

        lines = sample_task(task, self.tokenizer, lambda: self.engine, self.sampling, folder)
        evaluation = evaluation_of(task, lines, self.sampling)
        result = {
            "benchmark": task.name,
            "model": self.args.model,
            "settings": json.loads((folder / SETTINGS).read_text(encoding="utf-8")),
            **metrics_of(evaluation, task.has_answers),
        }
        if self.args.budget_curve:
            result["budget_curve"] = budget_curve(evaluation)
        if self.args.depth_curve:
            result |= self._depth_curves(task, lines, result.get("budget_curve"), folder)
        write_result(folder / METRICS, json.dumps(result, indent=1, allow_nan=False) + "\n")
        return result

    def _depth_curves(
        self, task: "Task", lines: list[dict[str, Any]], budgets: dict[str, Any] | None, folder: Path
    ) -> dict[str, Any]:
        from ..episodes import token_bytes
        from ..evaluation import depth

        try:
            vocabulary = token_bytes(self.tokenizer)
        except ValueError as error:
            raise UserError(f"--depth_curve: {error}") from error
        cuts = depth.find_cuts(lines, vocabulary, self.asking.episode_format, self.asking.max_episodes)
        if self.positions is not None:
            depth.check_lengths(task, lines, cuts, self.num_more, self.positions)
        answers = depth.ask_answers(
            task,
            lines,
            cuts,
            self.tokenizer,
            lambda: self.engine,
            self.sampling,
            self.asking,
            folder,
            shares_prefixes=self.args.vllm,
        )
        given = (lines, cuts, answers, self.asking.answer_probe)
        curves = {"depth_curve": depth.depth_curve(*given) | {"settings": vars(self.asking)}}
        if budgets is not None:
            asked = depth.accuracy_when_asked(*given, budgets["budgets"])
            curves["budget_curve"] = budgets | {"accuracy_when_asked": asked}
        return curves


def _stored_results(output: Path) -> list[dict[str, Any]]:
    """Return the numbers of all benchmarks in the output folder, of earlier commands too; what is none is said."""
    results = []
    for path in sorted(output.glob(f"*/{METRICS}")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _say(f"{path} is left out of {TABLE}: it cannot be read ({one_line(error)}).")
            continue
        if isinstance(result, dict) and {"benchmark", "tiers", "settings"} <= result.keys():
            results.append(result)
        else:
            _say(f"{path} is left out of {TABLE}: it is not of an evaluation.")
    return results


def _say(text: str) -> None:
    print(f"l2t eval: {text}", file=sys.stderr)
