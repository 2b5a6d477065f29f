"""`l2t plot`: draw trainings and evaluations side by side."""

import argparse
from pathlib import Path

from ..errors import UserError


PAGE = "index.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = (
        "A RUN is an output folder of `l2t train` (metrics.json, or trainer_state.json in its last checkpoint) or of "
        "`l2t eval`. Drawn are, as far as the runs have them: accuracy and tokens by benchmark and model, accuracy by "
        f"depth and by token budget, and training curves; {PAGE} shows all of them, and can be passed on as it is."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training or an evaluation")
    parser.add_argument("--output", required=True, metavar="DIR", help=f"folder for the PNG files and {PAGE}")


def main(args: argparse.Namespace) -> int:
    """
    Run the command.

    Raises:
        UserError: if a run cannot be read, holds nothing to draw, or the output cannot be written.
    """
    from ..evaluation.compare import draw_runs, read_runs
    from ..evaluation.journal import write_result
    from ..evaluation.runs_page import page_of

    runs = read_runs(args.runs)
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        drawings = draw_runs(runs, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}).") from error
    if not drawings:
        raise UserError("RUN: there is nothing to draw in the runs, neither a logged step nor a judged completion.")
    write_result(output / PAGE, page_of(runs, drawings))
    for path in [*(drawing.path for drawing in drawings), output / PAGE]:
        print(path)
    return 0
