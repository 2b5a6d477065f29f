"""Self-contained HTML pages, and the one that shows scored completions, their episodes coloured by reward."""

import math
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any


# Rewards above and below zero, laid translucently over the page: told apart by colour-blind readers as well.
_GAIN_RGB, _LOSS_RGB = "31, 119, 205", "226, 110, 20"
_MAX_OPACITY = 0.6
# Share of the episodes whose rewards the colour scale tells apart.
STRONG_SHARE = 0.95

# No script may run and nothing may be loaded, whatever a page's texts hold.
_DOCUMENT = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --dim: #5d6670; --line: #d5dae0; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --text: #e6e9ed; --dim: #9aa4af; --line: #363d46; --card: #1c2026; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 9rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 16px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1rem; margin: 0; }
.dim { color: var(--dim); }
$style
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")

_STYLE = Template("""\
.legend { display: flex; align-items: center; gap: .6rem; flex-wrap: wrap; margin: .8rem 0 1.4rem; font-size: .9rem; }
.legend .bar { width: min(14rem, 30vw); height: 1rem; border: 1px solid var(--line); border-radius: .2rem;
  background: linear-gradient(to right,
    rgba($loss, $opacity), rgba($loss, 0) 50%, rgba($gain, 0) 50%, rgba($gain, $opacity)); }
article { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); padding: .9rem 1.1rem;
  margin: 0 0 1.2rem; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; align-items: baseline; }
.badge { border: 1px solid currentColor; border-radius: 1rem; padding: 0 .6rem; font-size: .85rem; font-weight: 600; }
.completion { white-space: pre-wrap; overflow-wrap: anywhere; margin: .8rem 0;
  font: .92rem/1.9 ui-monospace, monospace; }
.ep { border-left: 2px solid var(--dim); padding: .12rem 0; cursor: help; }
.ep:hover, .ep:focus { outline: 2px solid var(--text); outline-offset: 1px; }
.ep > .tip { display: none; }
.ep:hover > .tip, .ep:focus > .tip { display: block; position: fixed; z-index: 2; left: 50%; bottom: 1rem;
  transform: translateX(-50%); width: min(46rem, 94vw); padding: .7rem 1rem; border: 1px solid var(--text);
  border-radius: .5rem; background: var(--back); color: var(--text); font: .9rem/1.5 system-ui, sans-serif;
  white-space: normal; box-shadow: 0 .3rem 1.2rem rgba(0, 0, 0, .35); }
.ep:hover > .tip { z-index: 3; }
.tip dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .2rem 1rem;
  margin: .2rem 0 0; }
.tip dt { color: var(--dim); } .tip dd { margin: 0; font-variant-numeric: tabular-nums; }
details > summary { cursor: pointer; color: var(--dim); font-size: .9rem; }
details > pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; font-size: .88rem; }
svg { display: block; max-width: 100%; height: auto; color: var(--dim); }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }""")

_BODY = Template("""\
<p class="dim">$summary Point at an episode, or reach it with the tab key, for its numbers.</p>
<div class="legend" role="img" aria-label="Colour scale of the episode rewards, from orange below zero to blue above">
<span>episode reward</span><span>&minus;$strong or less</span><span class="bar"></span>
<span>+$strong or more</span></div>
$articles""")


def document(title: str, body: str, style: str = "", with_images: bool = False) -> str:
    """
    Return one HTML page without scripts or external resources.

    Args:
        title (`str`):
            Heading of the page, plain text.
        body (`str`):
            HTML below it.
        style (`str`, *optional*):
            CSS beside the common one.
        with_images (`bool`, *optional*):
            Whether the page may show images that are in its text (`data:`).
    """
    policy = "; img-src data:" if with_images else ""
    return _DOCUMENT.substitute(title=escape(title), body=body, style=style, policy=policy)


def render_page(rows: Sequence[dict[str, Any]], title: str) -> str:
    """
    Render scored completions as one HTML page without scripts or external resources.

    Args:
        rows (`Sequence[dict[str, Any]]`):
            Rows as `l2t score` writes them.
        title (`str`):
            Heading of the page.

    Returns:
        `str`: the page.
    """
    sizes = sorted(abs(episode["reward"]) for row in rows for episode in row["episodes"])
    # The colours' full strength. Not the largest reward: a single outlier would leave the rest of the page pale.
    strong = sizes[math.ceil(STRONG_SHARE * len(sizes)) - 1] if sizes else 0.0
    num_correct = sum(row["outcome"] == 1 for row in rows)
    summary = f"{len(rows)} completion{'' if len(rows) == 1 else 's'}, {num_correct} correct, {len(sizes)} spans."
    articles = "\n".join(_article(number, row, strong) for number, row in enumerate(rows, start=1))
    body = _BODY.substitute(summary=summary, strong=_format(strong), articles=articles)
    return document(title, body, _STYLE.substitute(gain=_GAIN_RGB, loss=_LOSS_RGB, opacity=_MAX_OPACITY))


def _article(number: int, row: dict[str, Any], strong: float) -> str:
    outcome = {1: "correct", 0: "wrong"}.get(row["outcome"], "not judged")
    spans = "".join(_span(index, episode, strong) for index, episode in enumerate(row["episodes"], start=1))
    reward = "-" if row["reward"] is None else _format(row["reward"])
    num_episodes = sum(not episode["is_answer"] for episode in row["episodes"])
    tokens = max((episode["end"] for episode in row["episodes"]), default=0)
    facts = [
        f"reward {reward}",
        f"J {row['correctness_before']:.3f} &rarr; {_last_correctness(row):.3f}",
        f"{num_episodes} episode{'' if num_episodes == 1 else 's'}, {tokens} tokens",
        f"gold answer <b>{escape(row['answer'])}</b>",
    ]
    return (
        f'<article id="completion-{number}"><header><h2>{number}</h2><span class="badge">{outcome}</span>'
        + "".join(f"<span>{fact}</span>" for fact in facts)
        + f"</header>\n<details><summary>prompt</summary><pre>{escape(_prompt_text(row['prompt']))}</pre></details>\n"
        + f'<div class="completion">{spans or "<i>empty</i>"}</div>\n{_curve(row)}</article>'
    )


def _span(index: int, episode: dict[str, Any], strong: float) -> str:
    name = "answer span" if episode["is_answer"] else f"episode {index}"
    reward = episode["reward"]
    opacity = _MAX_OPACITY * min(1.0, abs(reward) / strong) if strong > 0 else 0.0
    colour = _GAIN_RGB if reward >= 0 else _LOSS_RGB
    tip = "".join(
        f"<div><dt>{key}</dt><dd>{_format(episode[key])}</dd></div>"
        for key in ("reward", "gain", "penalty", "information", "correctness")
    )
    return (
        f'<span class="ep" tabindex="0" style="background: rgba({colour}, {opacity:.3f})">{escape(episode["text"])}'
        f'<span class="tip" role="tooltip"><b>{name}</b>, tokens {episode["start"]} to {episode["end"]}'
        f"<dl>{tip}</dl></span></span>"
    )


def _curve(row: dict[str, Any]) -> str:
    """Return J before the first and after each episode as an inline drawing."""
    values = [row["correctness_before"]] + [one["correctness"] for one in row["episodes"] if not one["is_answer"]]
    width, height, left, right, top, bottom = 420, 110, 34, 10, 10, 30
    step = (width - left - right) / max(1, len(values) - 1)
    points = [(left + k * step, top + (height - top - bottom) * (1 - value)) for k, value in enumerate(values)]
    axis = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity="{opacity}"/>'
        f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{label}</text>'
        for label, y, opacity in (("1", top, 0.25), ("0", height - bottom, 0.8))
    )
    every = max(1, -(-(len(values) - 1) // 15))
    ticks = "".join(
        f'<text x="{points[k][0]:.1f}" y="{height - bottom + 14}" text-anchor="middle">{k}</text>'
        for k in range(0, len(values), every)
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="rgb({_GAIN_RGB})">'
        f"<title>J after {k} episodes: {value:.4f}</title></circle>"
        for k, ((x, y), value) in enumerate(zip(points, values, strict=True))
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="J by episode, from {values[0]:.3f} to {values[-1]:.3f}">{axis}{ticks}'
        f'<text x="{width - right}" y="{height - 3}" text-anchor="end">episodes read</text>'
        f'<text x="{left}" y="{height - 3}">J, predicted probability of the gold answer</text>'
        f'<polyline points="{line}" fill="none" stroke="rgb({_GAIN_RGB})" stroke-width="2"/>{dots}</svg>'
    )


def _last_correctness(row: dict[str, Any]) -> float:
    return row["episodes"][-1]["correctness"] if row["episodes"] else row["correctness_before"]


def _prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _format(value: float) -> str:
    text = f"{value:.3g}" if abs(value) < 0.01 else f"{value:.3f}"
    return text.replace("-", "\N{MINUS SIGN}")
