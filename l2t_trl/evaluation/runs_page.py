"""Trainings and evaluations side by side as one self-contained HTML page."""

import base64
import struct
from collections.abc import Sequence
from html import escape
from typing import Any

from .compare import Drawing, Run
from .figures import DOTS_PER_INCH
from .page import document


CSS_DOTS_PER_INCH = 96
# Heads of the table, and what they mean.
COLUMNS = {
    "questions": "",
    "samples": "completions of each question",
    "pass@1, %": "mean over all completions",
    "95 % interval": "of pass@1, for as many independent completions as would vary as much",
    "pass@k, % (k)": "chance that one of k completions at least is right",
    "maj@k, % (k)": "chance that the answer of most of k is right",
    "tokens, mean": "length of a completion",
    "median": "",
    "tokens per correct answer": "all tokens over the number of right completions",
    "cut off, %": "completions that reached the token limit",
}

_STYLE = """\
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; overflow-wrap: anywhere; }
h1 + p, .dim { overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.8rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--dim); font-size: .9rem; margin-top: .4rem; max-width: 44rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
figure .wide { width: fit-content; max-width: 100%; padding: .5rem; background: #ffffff; }
.wide:focus-visible { outline: 2px solid var(--text); }
table { border-collapse: collapse; width: 100%; font-size: .86rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { font-weight: 600; color: var(--dim); }
th[scope=row] { position: sticky; left: 0; z-index: 1; background: var(--card); text-align: left; font-weight: 400;
  min-width: 8.5rem; max-width: 18rem; overflow-wrap: anywhere; }
thead th:first-child { position: sticky; left: 0; z-index: 1; background: var(--card); text-align: left; }
th[scope=rowgroup] { text-align: left; padding-top: .9rem; }
th[scope=rowgroup] span { position: sticky; left: .6rem; overflow-wrap: anywhere; }
tbody:last-child tr:last-child > * { border-bottom: 0; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--dim); font-size: .9rem; }
details > .wide { margin-top: .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: .5rem 0 0; font-size: .9rem; }
dd { margin: 0; color: var(--dim); }
@media (max-width: 45rem) {
  /* Letters keep their size; what is wider than the screen is moved under it. */
  figure img { max-width: none; }
  dl { grid-template-columns: 1fr; } dd { margin: 0 0 .4rem; }
}
@media (prefers-color-scheme: dark) {
  /* Dark paper, and the hues as they were. */
  figure .wide { background: #202020; }
  figure img { filter: invert(.9) hue-rotate(180deg) brightness(1.25); }
}"""


def page_of(runs: Sequence[Run], drawings: Sequence[Drawing]) -> str:
    """Return one page with the results as a table, and the drawings, which it holds itself."""
    results = [result for run in runs for result in run.results]
    parts = [f'<p class="dim">{escape(", ".join(run.label for run in runs))}</p>']
    if results:
        parts += [_table(results), _tiers(results), _meanings()]
    for section in dict.fromkeys(drawing.section for drawing in drawings):
        if section:
            parts.append(f"<h2>{escape(section)}</h2>")
        parts += [_figure(drawing) for drawing in drawings if drawing.section == section]
    return document("Runs side by side", "\n".join(part for part in parts if part), _STYLE, with_images=True)


def _table(results: Sequence[tuple[str, dict[str, Any]]], group: str = "benchmark") -> str:
    """Return a table with a line per run, those of a benchmark together."""
    groups: dict[str, list[str]] = {}
    for label, result in results:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(result))
        line = f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>\n'
        groups.setdefault(result[group], []).append(line)
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("run", *COLUMNS))
    bodies = "".join(
        f'<tbody><tr><th scope="rowgroup" colspan="{len(COLUMNS) + 1}"><span>{escape(name)}</span></th></tr>\n'
        + "".join(lines)
        + "</tbody>"
        for name, lines in groups.items()
    )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Results">'
        f"<table><thead><tr>{heads}</tr></thead>\n{bodies}</table></div>"
    )


def _tiers(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the table by difficulty tier, folded up; nothing if there are no tiers."""
    parts = [
        (label, part | {"tier": f"{result['benchmark']}, tier {tier}"})
        for label, result in results
        for tier, part in result.get("tiers", {}).items()
    ]
    if not parts:
        return ""
    parts.sort(key=lambda part: part[1]["tier"])
    return f"<details><summary>By difficulty tier</summary>{_table(parts, 'tier')}</details>"


def _meanings() -> str:
    entries = "".join(f"<dt>{head}</dt><dd>{meaning}</dd>" for head, meaning in COLUMNS.items() if meaning)
    return f"<details><summary>What the columns mean</summary><dl>{entries}</dl></details>"


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    interval, questions = result["accuracy_interval"], result.get("num_questions")
    completions = result.get("num_completions")
    return (
        "-" if questions is None else f"{questions:,}",
        "-" if not questions or completions is None else f"{completions / questions:g}",
        _number(result["accuracy"], 100),
        "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
        _at_most(result.get("pass_at")),
        _at_most(result.get("majority_at")),
        _number(result["mean_tokens"]),
        _number(result.get("median_tokens")),
        _number(result["tokens_per_correct"]),
        _number(result["truncated_share"], 100),
    )


def _figure(drawing: Drawing) -> str:
    content = drawing.path.read_bytes()
    # A PNG file says its size here. Letters shall have the same size in all drawings.
    width, height = (
        round(pixels * CSS_DOTS_PER_INCH / DOTS_PER_INCH) for pixels in struct.unpack(">II", content[16:24])
    )
    return (
        f'<figure><div class="wide" tabindex="0" role="region" aria-label="Drawing: {escape(drawing.title)}">'
        f'<img alt="{escape(drawing.description)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode()}"></div>'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def _at_most(shares: dict[str, float] | None) -> str:
    """Return the share at the largest k; one sample says no more than pass@1."""
    k = max(map(int, shares or {}), default=1)
    return "-" if k == 1 or shares[str(k)] is None else f"{100 * shares[str(k)]:.1f} ({k})"


def _number(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{factor * value:,.1f}"
