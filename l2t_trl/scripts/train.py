"""
`l2t train`: train a model with L2T, or with plain GRPO, and evaluate it before and after.

Nothing heavy is imported at the top, so that `l2t train --help` answers at once.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from l2t_trl.errors import UserError


@dataclass
class L2TScriptArguments:
    r"""
    Arguments of the training script that are neither the trainer's nor the model's.

    Parameters:
        method (`str`, *optional*, defaults to `"l2t"`):
            `"l2t"`, or `"grpo"` for the control: TRL's own GRPOTrainer with the same settings, data and rewards.
        dataset_name (`str`, *optional*, defaults to `"arithmetic"`):
            Name of a known data set (`l2t data list`), such as `"arithmetic"`, the built-in world of column additions,
            or `"python-functions"`, functions to write; Hub id; path of a .jsonl, .json, .csv or .parquet file, verl's
            included; or folder with one such file per split.
        dataset_config (`str`, *optional*):
            Configuration of a Hub data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on. A data set without it gives `test_size` of its training rows away instead.
        test_dataset_name (`str`, *optional*):
            Other data set to evaluate on, named as `dataset_name` is.
        train_size (`int`, *optional*):
            Rows to train on: as many are drawn by `seed`; by default all (2,048 of endless sets).
        test_size (`int`, *optional*):
            Rows to evaluate on, the same ones whatever the seed; by default all (200 of endless sets).
        question_column (`str`, *optional*):
            Column with the question; found among question, problem and prompt if unset.
        tiers (`list[int]`, *optional*):
            Difficulty tiers, 1 to 4, of data sets that have them; by default all.
        system_prompt (`str`, *optional*):
            System message in front of every question.
        instruction (`str`, *optional*):
            Text appended to every question behind a line break.
        reward_funcs (`list[str]`, *optional*, defaults to `["accuracy"]`):
            Outcome rewards: `accuracy`, `format`, `code`, or the dotted path of a function such as
            `trl.rewards.think_format_reward`.
        eval_before_after (`bool`, *optional*, defaults to `True`):
            Whether to evaluate on the test rows before and after training and to write the report.
        eval_samples (`int`, *optional*, defaults to `1`):
            Completions per test question in those two evaluations.
        eval_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of those two evaluations; 0 decodes greedily.
        eval_top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus of those two evaluations.
    """

    method: Literal["l2t", "grpo"] = field(
        default="l2t", metadata={"help": "Trainer: L2T, or GRPO (TRL's own) as its control with the same settings."}
    )
    dataset_name: str = field(
        default="arithmetic",
        metadata={
            # Written out, since the help is read from this text; tests compare it with the registry.
            "help": "Known name (l2t data list says more): aime24, aime25, amc23, math500, minerva, omni-math, gsm8k, "
            "aime-919, numinamath-4k, deepscaler, mbpp, arithmetic, python-functions or reasoning_gym:NAME; or Hub id, "
            ".jsonl/.json/.csv/.parquet file, or folder of such files."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on; without it, test_size training rows are held out instead."},
    )
    test_dataset_name: str | None = field(
        default=None, metadata={"help": "Other data set to evaluate on, named as dataset_name is."}
    )
    train_size: int | None = field(
        default=None, metadata={"help": "Rows to train on, drawn by the seed (default: all; of endless sets 2048)."}
    )
    test_size: int | None = field(
        default=None,
        metadata={"help": "Rows to evaluate on, the same for every seed (default: all; of endless sets 200)."},
    )
    question_column: str | None = field(
        default=None, metadata={"help": "Column with the question (default: question, problem or prompt)."}
    )
    tiers: list[int] | None = field(
        default=None, metadata={"help": "Difficulty tiers, 1 to 4, of data sets that have them (default: all)."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message in front of every question."})
    instruction: str | None = field(
        default=None, metadata={"help": "Text appended to every question behind a line break."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy"],
        metadata={"help": "Outcome rewards: accuracy, format, code, or the dotted path of a function."},
    )
    eval_before_after: bool = field(
        default=True, metadata={"help": "Evaluate before and after training and write the report."}
    )
    eval_samples: int = field(
        default=1, metadata={"help": "Completions per test question in the evaluations before and after."}
    )
    eval_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the evaluations before and after (0: greedy)."}
    )
    eval_top_p: float = field(default=1.0, metadata={"help": "Nucleus of the evaluations before and after."})

    def __post_init__(self):
        for name in ("train_size", "test_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or larger, got {value}.")
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples must be 1 or larger, got {self.eval_samples}.")
        if not self.eval_temperature >= 0:
            raise ValueError(f"eval_temperature must be 0 (greedy) or larger, got {self.eval_temperature}.")
        if not 0 < self.eval_top_p <= 1:
            raise ValueError(f"eval_top_p must be above 0 and at most 1, got {self.eval_top_p}.")
        if self.tiers is not None and not set(self.tiers) <= {1, 2, 3, 4}:
            raise ValueError(f"tiers must be among 1, 2, 3 and 4, got {self.tiers}.")
        if not self.reward_funcs:
            raise ValueError("reward_funcs must name at least one outcome reward.")


@dataclass
class LaunchArguments:
    """
    How the script is started.

    Parameters:
        accelerate_config (`str`, *optional*):
            File, or name of one in `accelerate_configs/` (ours first, then TRL's), for accelerate's launcher. Without
            it the script runs in this process.
        num_processes (`int`, *optional*):
            Overrides the accelerate configuration, as do the next four.
        num_machines (`int`, *optional*):
            Number of machines.
        machine_rank (`int`, *optional*):
            Rank of this machine.
        main_process_ip (`str`, *optional*):
            Address of machine 0.
        main_process_port (`int`, *optional*):
            Port of machine 0.
        dry_run (`bool`, *optional*, defaults to `False`):
            Print the resolved configuration as YAML that `--config` takes, and stop.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "File or name of an accelerate configuration to launch with (ours, then TRL's)."},
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "Number of processes instead of the accelerate configuration's."}
    )
    num_machines: int | None = field(default=None, metadata={"help": "Number of machines, likewise."})
    machine_rank: int | None = field(default=None, metadata={"help": "Rank of this machine, likewise."})
    main_process_ip: str | None = field(default=None, metadata={"help": "Address of machine 0, likewise."})
    main_process_port: int | None = field(default=None, metadata={"help": "Port of machine 0, likewise."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print the resolved configuration as YAML for --config, and stop."}
    )


def run(argv: list[str]) -> int:
    """Run `l2t train` with `argv`: parse, then print (`--dry-run`), launch (`--accelerate_config`) or train."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0

    quieten_vllm()
    from l2t_trl.parsing import dump_configuration, parse

    configuration = parse(argv)
    if configuration.launch.dry_run:
        print(dump_configuration(configuration), end="")
        return 0
    if configuration.launch.accelerate_config is not None:
        from l2t_trl.launch import launch

        return launch(configuration.launch, argv)
    main(configuration.script, configuration.training, configuration.model)
    return 0


def quieten_vllm():
    """Keep vLLM's hundreds of lines off the screen, unless asked for; it reads this when it is imported."""
    import os

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def setting_sections() -> tuple:
    """Return title and fields of each class of settings, from the sources; a field's first declaration holds."""
    from l2t_trl.fields import module_path, read_fields

    return (
        ("L2T", read_fields(module_path("l2t_trl", "l2t_config.py"), "L2TConfig")),
        ("Script", read_fields(__file__, "L2TScriptArguments")),
        ("Launch", read_fields(__file__, "LaunchArguments")),
        ("GRPO (trl)", read_fields(module_path("trl", "trainer", "grpo_config.py"), "GRPOConfig")),
        ("Model (trl)", read_fields(module_path("trl", "trainer", "model_config.py"), "ModelConfig")),
        ("Training (trl)", read_fields(module_path("trl", "trainer", "base_config.py"), "_BaseConfig")),
        (
            "Training (transformers)",
            read_fields(module_path("transformers", "training_args.py"), "TrainingArguments"),
        ),
    )


def help_text() -> str:
    """Return the text of `l2t train --help`: every setting, from the sources."""
    import textwrap

    lines = [
        "usage: l2t train [--config FILE] [--any-field VALUE ...] [--accelerate_config NAME|FILE] [--dry-run]",
        "",
        "Train a model with L2T, or with GRPO for comparison, and evaluate it before and after.",
        "",
        "--config FILE  YAML file with any of the settings below; the command line overrides it. A mapping under the",
        "               key `env` sets environment variables.",
        "-h, --help     Show this text.",
    ]
    # Unbroken words, so that every name and link can be searched for.
    wrapper = textwrap.TextWrapper(
        100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False, break_long_words=False
    )
    seen = set()
    for title, fields in setting_sections():
        lines += ["", f"{title}:"]
        for item in fields:
            # A class further up declares the field anew, with the default that holds.
            if item.name in seen:
                continue
            seen.add(item.name)
            lines.append(f"  --{item.name}  ({item.type}, default {item.default or 'none'})")
            lines += wrapper.wrap(item.help)
    return "\n".join(lines)


def main(script_args, training_args, model_args):
    """
    Train as configured.

    Args:
        script_args ([`L2TScriptArguments`]):
            Data, rewards and evaluation.
        training_args ([`L2TConfig`]):
            Settings of the trainer.
        model_args (`trl.ModelConfig`):
            Model and adapters.

    Raises:
        UserError: before anything long starts, if model, data, rewards or output folder cannot be used.
    """
    import os
    from pathlib import Path

    from transformers import set_seed
    from trl.import_utils import is_vllm_available

    from l2t_trl.checkpoints import check_resumable
    from l2t_trl.data.loading import load_rows
    from l2t_trl.memory import LOST_UPDATES, loses_updates
    from l2t_trl.model_card import write_model_card
    from l2t_trl.models import load_tokenizer, resolve_model
    from l2t_trl.rewards import get_reward_funcs

    is_main = int(os.environ.get("RANK", "0")) == 0
    say = print if is_main else _say_nothing

    if training_args.use_vllm and not is_vllm_available():
        raise UserError(
            "use_vllm is true, but vLLM is not installed: pip install vllm==0.31.0, or set use_vllm to false."
        )
    check_output_dir(training_args.output_dir)
    checkpoint = find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir, say)
    if checkpoint is not None:
        check_resumable(Path(checkpoint), training_args)
    reward_funcs = get_reward_funcs(script_args.reward_funcs)
    model_path = resolve_model(model_args.model_name_or_path, say=say)
    tokenizer = load_tokenizer(model_path, revision=model_args.model_revision)
    train_rows, test_rows = load_rows(script_args, training_args, tokenizer, say)
    num_test_rows = 0 if test_rows is None else len(test_rows)
    say(f"Data: {script_args.dataset_name}, {len(train_rows)} rows to train on, {num_test_rows} to evaluate on.")

    set_seed(training_args.seed)
    trainer = build_trainer(
        script_args, training_args, model_args, model_path, tokenizer, reward_funcs, train_rows, test_rows
    )

    has_fp32_weights = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or model_args.use_peft
    if not has_fp32_weights and loses_updates(model_args.dtype, training_args.learning_rate):
        say(f"Warning: {LOST_UPDATES}")

    is_evaluated = script_args.eval_before_after and test_rows is not None
    if is_evaluated and trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        say("No evaluation before and after: the weights are sharded (ZeRO-3). Evaluate the saved model instead.")
        is_evaluated = False
    before = evaluate_now(trainer, script_args, test_rows, "before training") if is_evaluated else None

    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)

    after = evaluate_now(trainer, script_args, test_rows, "after training") if is_evaluated else None
    if trainer.accelerator.is_main_process:
        sections = ""
        if is_evaluated:
            from l2t_trl.evaluation import model_card_sections, write_report

            settings = vars(script_args) | vars(model_args) | training_args.to_dict()
            write_report(training_args.output_dir, before, after, trainer.state.log_history, settings)
            sections = model_card_sections(before, after, settings)
        write_model_card(trainer, model_args.model_name_or_path, script_args.dataset_name, sections)
        contents = "Model, model card, metrics.json and plots" if is_evaluated else "Model and model card"
        say(f"{contents}: {os.path.abspath(training_args.output_dir)}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if training_args.use_vllm:
        trainer.vllm_generation.close()
    trainer.accelerator.end_training()


def build_trainer(script_args, training_args, model_args, model_path, tokenizer, reward_funcs, train_rows, test_rows):
    """Return the trainer for `script_args.method`; settings that it refuses are a [`UserError`]."""
    from transformers import ProgressCallback
    from trl import GRPOTrainer, get_peft_config, get_quantization_config

    from l2t_trl.generation.engine import rollout_engine
    from l2t_trl.progress import StepLine

    if script_args.method == "l2t":
        from l2t_trl import L2TTrainer as Trainer
    else:
        Trainer = GRPOTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    try:
        # L2TTrainer uses that engine by itself; its control shall have the same rollouts.
        with rollout_engine(training_args):
            trainer = Trainer(
                model=model_path,
                reward_funcs=reward_funcs,
                args=training_args,
                train_dataset=train_rows,
                eval_dataset=test_rows if training_args.eval_strategy != "no" else None,
                processing_class=tokenizer,
                quantization_config=get_quantization_config(model_args),
                peft_config=get_peft_config(model_args),
            )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    trainer.remove_callback(ProgressCallback)
    if not training_args.disable_tqdm:
        trainer.add_callback(StepLine)
    return trainer


def evaluate_now(trainer, script_args, test_rows, description: str):
    """Evaluate the trainer's model on `test_rows` in the main process, while the others wait."""
    from l2t_trl.evaluation import evaluate

    evaluation = None
    if trainer.accelerator.is_main_process:
        evaluation = evaluate(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            test_rows,
            max_new_tokens=trainer.args.max_completion_length,
            temperature=script_args.eval_temperature,
            top_p=script_args.eval_top_p,
            batch_size=trainer.args.per_device_eval_batch_size,
            seed=trainer.args.seed,
            num_samples=script_args.eval_samples,
            description=description,
        )
    trainer.accelerator.wait_for_everyone()
    return evaluation


def check_output_dir(output_dir: str):
    """Make the output folder and write a file into it, or raise a [`UserError`]."""
    import os
    import tempfile

    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir {output_dir} cannot be written: {error.strerror}. Set another output_dir."
        ) from error


def find_checkpoint(requested: str | None, output_dir: str, say=print) -> str | None:
    """
    Return the checkpoint folder to resume from.

    Args:
        requested (`str`, *optional*):
            A folder, or `"auto"` for the last complete checkpoint in `output_dir`, if there is one.
        output_dir (`str`):
            Folder in which the trainer saves its checkpoints.
        say (`Callable`, *optional*):
            Told which incomplete checkpoints were left out.

    Returns:
        `str` or `None`: `None` starts from the beginning.
    """
    import os

    if requested is None:
        return None
    if requested == "auto":
        from l2t_trl.checkpoints import last_complete_checkpoint

        folder, incomplete = last_complete_checkpoint(output_dir)
        for skipped in incomplete:
            say(f"{skipped} was cut off while it was written and is left out.")
        return None if folder is None else str(folder)
    if not os.path.isfile(os.path.join(requested, "trainer_state.json")):
        raise UserError(
            f"resume_from_checkpoint {requested} is not a checkpoint folder (no trainer_state.json in it)."
        )
    return requested


def _say_nothing(*_):
    pass


if __name__ == "__main__":
    # Started by accelerate's launcher in each process: here accelerate_config has been followed already.
    quieten_vllm()
    from l2t_trl.cli import report_errors
    from l2t_trl.launch import end_process, hand_to_launcher
    from l2t_trl.parsing import parse as parse_in_process

    def _main() -> int:
        try:
            configuration = parse_in_process(sys.argv[1:])
            main(configuration.script, configuration.training, configuration.model)
        except UserError as error:
            if hand_to_launcher(error):
                return 2
            raise
        return 0

    exit_code = report_errors("train", _main)
    if exit_code == 0:
        end_process()
    sys.exit(exit_code)
