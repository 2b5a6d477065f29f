"""The command `l2t`. Each subcommand is a module of `l2t_trl.scripts`, imported when it is called."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

from l2t_trl import __version__
from l2t_trl.errors import RolloutError, UserError


COMMANDS = {
    "train": "train a model with L2T, or with GRPO for comparison",
    "plan": "say what memory a recipe takes on given GPUs, and whether it fits",
    "serve": "start a vLLM server for rollouts",
    "eval": "measure a model on benchmarks",
    "plot": "draw trainings and evaluations side by side",
    "score": "score the episodes of given completions, without training",
    "data": "list, show and prepare data sets, and write them in verl's layout",
    "env": "print versions and what runs on this machine",
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other of the commands, rather than all options before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists the options)\n")


def main(argv: list[str] | None = None) -> int:
    """
    Run one subcommand.

    Args:
        argv (`list[str]`, *optional*):
            Arguments behind the program's name, by default those of the process.

    Returns:
        `int`: exit code; 2 for a mistake in what the user gave.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="l2t", description="Learning to Think on TRL.")
    parser.add_argument("--version", action="version", version=f"l2t_trl {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    # Only the first word is read here; the rest belongs to the subcommand.
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    return run(command, argv[1:])


def run(command: str, argv: list[str]) -> int:
    """Run the subcommand `command` with `argv` and return its exit code."""
    module = importlib.import_module(f"l2t_trl.scripts.{command}")
    if command == "train":
        return report_errors(command, lambda: module.run(argv))
    summary = COMMANDS[command]
    parser = OneLineParser(
        prog=f"l2t {command}", description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    return report_errors(command, lambda: module.main(args))


def report_errors(command: str, function: Callable[[], int]) -> int:
    """Return what `function` returns; a [`UserError`] is shown as one message and becomes exit code 2."""
    try:
        code = function()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"l2t {command}: error: {error}", file=sys.stderr)
        return 2
    except RolloutError as error:
        print(f"l2t {command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"l2t {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
