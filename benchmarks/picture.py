"""The picture of the README: an answer coloured by who drafted each token, and the speed of each method, as SVG.

python -m benchmarks picture                                   # draws it again, with the figures kept in docs/
python -m benchmarks picture --figures out/bench/bench.json    # with those that `make bench` has written
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from xml.sax.saxutils import escape

import torch
from transformers.utils import logging

from benchmarks.pair import DRAFTER, PROMPTS, TARGET, load_model, load_tokenizer, read_prompts
from csdraft import Report
from csdraft.bench import configured
from csdraft.cascade import CascadeDrafter
from csdraft.drafters.max_gram import MaxGram
from csdraft.metrics.intervals import Interval

__all__ = ["KEPT", "caption", "headline", "main", "markdown"]

Json = dict[str, Any]
KEPT = Path("docs/figures/bundled_pair.json")
"""What docs/ is written from: a run of `make bench` without its samples."""
LABELS = {
    "hf_assisted_fixed": "transformers `assistant_model`, 5 tokens a round",
    "hf_assisted_default": "transformers `assistant_model`, default",
    "hf_prompt_lookup": "transformers prompt lookup, 5 tokens",
    "drafter_fixed": "csdraft, the same drafter, 5 tokens a round",
    "drafter": "csdraft, the same drafter, default",
    "prompt_lookup_fixed": "csdraft, prompt lookup, 5 tokens",
    "max_gram": "csdraft, MaxGram, default",
    "auto": 'csdraft, `assistant="auto"`',
    "cascade": "csdraft, cascade of drafter and MaxGram, default",
}
"""Of the methods of `benchmarks.methods` that have a row."""
PROMPT, NEW_TOKENS, PROMPT_LINES = "connection, authkey", 72, 3
"""What the prompt of the picture ends with, the tokens of the answer, and how much of the prompt is shown."""
COLOURS = ("none", "#a9cfe8", "#f6d58a")
INK, FAINT, WIDTH, MARGIN = "#24292f", "#6e7781", 860, 24
COLUMN, LINE = 7.4, 19.0
"""Width of a character and height of a line of the answer."""


def shown(document: Json) -> list[Json]:
    """The figures that have a row, in the order of `LABELS`."""
    found = {figure["name"]: figure for figure in document["figures"]}
    return [found[name] for name in LABELS if name in found]


def interval(figure: Json) -> Interval:
    return Interval(**figure["speedup"])


def markdown(document: Json) -> str:
    """The figures as a table of a page."""
    lines = [
        "| Method | Speed-up over plain `generate` [95 %] | Tokens a round | Outside forwards |",
        "|---|---|---|---|",
    ]
    for figure in shown(document):
        cells = LABELS[figure["name"]], interval(figure), f"{figure['block_efficiency']:.2f}"
        lines.append(f"| {cells[0]} | {cells[1]} | {cells[2]} | {100 * figure['outside_share']:.0f} % |")
    return "\n".join(lines)


def headline(document: Json) -> str:
    """What a reader should know of the figures, in a sentence."""
    found = {figure["name"]: interval(figure) for figure in shown(document)}
    return (
        f'`assistant="auto"` is {found["auto"]} times as fast as plain `generate` here, the cascade '
        f"{found['cascade']} times, transformers' `assistant_model` with the same drafter "
        f"{found['hf_assisted_fixed']} times and its prompt lookup {found['hf_prompt_lookup']} times (median and 95 % "
        f"interval)."
    )


def caption(document: Json) -> str:
    """Where and how it was measured, in one sentence."""
    machine, settings = document["machine"], document["settings"]
    prompts = max(figure["compared"] or 0 for figure in document["figures"])
    threads, load = machine["threads"], machine["load_before"] or 0.0
    text = (
        f"Bundled pair, {machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}, {machine['dtype']}, greedy, "
        f"{settings['max_new_tokens']} new tokens, {prompts} prompts {settings['repetitions']} times, all "
        f"methods side by side in one run"
    )
    shared = f", on a machine that was also doing other work (load {load:.1f} before the run)" if load > 0.5 else ""
    return f"{text}{shared}."


def answer(target_path: str, drafter_path: str, prompts: str) -> tuple[str, list[tuple[str, int]], list[str]]:
    """The prompt's last lines, the answer as (text of a token, level that drafted it), and the levels' names."""
    tokenizer = load_tokenizer(target_path)
    models = [load_model(path, torch.device("cpu"), torch.float32) for path in (target_path, drafter_path)]
    target = cast(Any, configured(models[0], pad_token_id=tokenizer.eos_token_id))
    prompt = next(text for text in read_prompts(prompts) if PROMPT in text.splitlines()[-1])
    inputs = tokenizer(prompt, return_tensors="pt")
    cascade = CascadeDrafter([models[1], MaxGram()], k_matrix=[[3, 12], [0, 6]], schedule="fixed")
    target.generate(**inputs, assistant=cascade, max_new_tokens=NEW_TOKENS, do_sample=False)
    report, parts, before = cast(Report, cascade.report), [], ""
    for place, level in enumerate(report.levels[0]):
        text = tokenizer.decode(report.tokens[0][: place + 1])
        parts.append((text[len(before) :], level))
        before = text
    return "\n".join(prompt.splitlines()[-PROMPT_LINES:]), parts, list(report.level_names)


def words(x: float, y: float, text: str, size: float, colour: str = INK, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" {more}>{escape(text)}</text>'


def code(parts: Sequence[tuple[str, int]], top: float) -> Iterator[tuple[str, float]]:
    """Each token as a piece of SVG on its level's colour, with the height that the text has reached."""
    row, column = 0, 0
    for text, level in parts:
        for index, piece in enumerate(text.split("\n")):
            if index:
                row, column = row + 1, 0
            x, y, wide = MARGIN + column * COLUMN, top + row * LINE, len(piece) * COLUMN
            colour = COLOURS[level] if 0 <= level < len(COLOURS) else "none"
            drawn = ""
            if piece and colour != "none":
                drawn = (
                    f'<rect x="{x:.1f}" y="{y - 13:.1f}" width="{wide - 0.6:.1f}" height="17" rx="2" fill="{colour}"/>'
                )
            if piece.strip():
                ink = FAINT if level < 0 else INK
                fixed = f'class="code" xml:space="preserve" textLength="{wide:.1f}" lengthAdjust="spacingAndGlyphs"'
                drawn += words(x, y, piece, 12.3, ink, fixed)
            column += len(piece)
            yield drawn, y


def bars(document: Json, top: float) -> Iterator[str]:
    """One bar a method, with its interval and tokens a round."""
    figures = shown(document)
    left, room = MARGIN + 330, 190
    most = max(interval(figure).median for figure in figures)
    yield words(left, top - 18, "speed-up over plain generate [95 %]", 11.5, FAINT)
    yield words(WIDTH - MARGIN, top - 18, "tokens a round", 11.5, FAINT, 'text-anchor="end"')
    for index, figure in enumerate(figures):
        y, speed = top + 22 * index, interval(figure)
        fill = "#b9c0c7" if figure["name"].startswith("hf_") else "#5b9bc8"
        yield words(MARGIN, y, LABELS[figure["name"]].replace("`", ""), 12.5)
        wide = room * speed.median / most
        yield f'<rect x="{left}" y="{y - 11:.1f}" width="{wide:.1f}" height="14" fill="{fill}"/>'
        yield words(left + wide + 6, y, str(speed), 12)
        yield words(WIDTH - MARGIN, y, f"{figure['block_efficiency']:.2f}", 12, INK, 'text-anchor="end"')


def drawing(document: Json, prompt: str, parts: Sequence[tuple[str, int]], names: Sequence[str]) -> str:
    """The whole picture."""
    lines = list(code([(prompt, -1), *parts], 56.0))
    pieces = [drawn for drawn, _ in lines]
    x, y = MARGIN, lines[-1][1] + 34
    labels = ["the target itself", f"drafted by a small model ({names[1]})", f"copied from the text ({names[2]})"]
    for label, colour in zip(labels, COLOURS, strict=True):
        pieces.append(
            f'<rect x="{x}" y="{y - 11:.1f}" width="14" height="14" rx="2" fill="{colour}" stroke="{FAINT}" '
            f'stroke-width="0.5"/>'
        )
        pieces.append(words(x + 20, y, label, 12))
        x += 40 + 6.6 * len(label)
    top = y + 62
    pieces += bars(document, top)
    height = top + 22 * len(shown(document)) + 4
    head = words(
        MARGIN,
        30,
        "model.generate(**inputs, assistant=cascade): the same text as without",
        13,
        INK,
        'font-weight="bold"',
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img" '
            f'aria-label="An answer coloured by what drafted each token, and the speed of each method">',
            "<style>.code { font-family: ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace; }</style>",
            f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
            head,
            *filter(None, pieces),
            "</svg>\n",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Keeps the figures of a run, if one is named, and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", type=Path, metavar="FILE", help=f"a run to keep in {KEPT}")
    parser.add_argument("--target", default=TARGET, help="path or Hub id (default: %(default)s)")
    parser.add_argument("--drafter", default=DRAFTER, help="path or Hub id (default: %(default)s)")
    parser.add_argument("--prompts", default=PROMPTS, help="where the picture's prompt is (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=KEPT.with_name("answer.svg"), help="default: %(default)s")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    document = json.loads((options.figures or KEPT).read_text(encoding="utf-8"))
    if options.figures is not None:
        document = {key: document[key] for key in ("machine", "settings", "figures")}
        KEPT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    options.out.write_text(
        drawing(document, *answer(options.target, options.drafter, options.prompts)), encoding="utf-8"
    )
    print(f"written: {options.out}")
