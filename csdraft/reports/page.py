"""A report as a web page and in a notebook: a sentence, the text coloured by level, its rounds, and the tables.

The page needs no script, no other file and no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import islice
from typing import TYPE_CHECKING

from csdraft.reports.detokenizer import Detokenizer
from csdraft.reports.sentence import sentence
from csdraft.reports.view import Bar, Table, count, headlines, tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from csdraft.reports.report import Report

__all__ = ["fragment", "page"]

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
LINES = ("solid", "dashed", "dotted", "double")
"""Each level has a colour and a kind of underline. The colours are Okabe and Ito's, for colour-blind readers too."""
MOST_ROUNDS, MOST_CELLS = 120, 40
"""The most rounds that are drawn, and the most tokens of one round."""
IN_A_NOTEBOOK = 400
"""Tokens of a row that a notebook shows. It stores what it shows, so all of a long text would make its file large."""

STYLE = """
.csdraft { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; --line: #8886; }
.csdraft .lead { font-size: 1.35em; line-height: 1.35; margin: .2em 0 .5em; }
.csdraft .basis { opacity: .75; }
.csdraft h2 { font-size: 1.1em; margin: 1.6em 0 .3em; }
.csdraft .scroll { overflow-x: auto; }
.csdraft table { border-collapse: collapse; margin: .3rem 0 1.2rem; font-variant-numeric: tabular-nums; }
.csdraft caption { text-align: left; font-weight: 600; padding: .3rem 0; }
.csdraft th, .csdraft td { text-align: right; padding: .15rem .7rem; font-weight: 400; white-space: nowrap;
  border-bottom: 1px solid var(--line); background: none; color: inherit; }
.csdraft th { font-weight: 600; }
.csdraft th:first-child, .csdraft td:first-child, .csdraft td.bar { text-align: left; }
.csdraft .bar i { display: block; height: .7em; background: #3b8fc4; min-width: 1px; }
.csdraft .bar { min-width: 8rem; }
.csdraft pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace;
  padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px; background: none; color: inherit; }
.csdraft .legend span { display: inline-block; margin: 0 .8rem .3rem 0; padding: .05rem .4rem; }
.csdraft .strip { display: flex; flex-wrap: wrap; gap: 6px 8px; margin: .5rem 0; }
.csdraft .round { display: inline-flex; flex-wrap: wrap; gap: 2px; min-height: 14px; padding: 2px;
  border-left: 2px solid var(--line); }
.csdraft .round i { width: 9px; height: 14px; border-radius: 2px; box-sizing: border-box;
  border: 2px solid var(--of); background: var(--of); }
.csdraft .round i.no { background: none; border-width: 1.5px; opacity: .75; }
.csdraft li { margin: .1rem 0; }
@media (max-width: 40rem) { .csdraft .lead { font-size: 1.15em; } .csdraft pre { padding: .5rem; } }
"""

DARK = "@media (prefers-color-scheme: dark) {{\n{rules}\n}}"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>csdraft report</title>
<style>
:root {{ color-scheme: light dark; --paper: #fdfdfc; --ink: #1b1b1b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #16181b; --ink: #e6e6e3; }} }}
body {{ margin: 1.5rem auto; max-width: 60rem; padding: 0 1rem; background: var(--paper); color: var(--ink); }}
</style></head><body>
{body}
</body></html>
"""


def fragment(report: Report) -> str:
    """The part of a page that a notebook shows: token ids instead of text, and only the beginning of a long text."""
    return _body(report, None, IN_A_NOTEBOOK)


def page(report: Report, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A whole page, with all of the last call's text."""
    return PAGE.format(body=_body(report, tokenizer, None))


def _body(report: Report, tokenizer: PreTrainedTokenizerBase | None, most: int | None) -> str:
    parts = [f'<p class="lead">{escape(sentence(report))}</p>']
    if report.rounds:
        parts.append(f'<p class="basis">{escape(_basis(report))}</p>')
    if any(report.tokens):
        parts += ["<h2>The text by drafting level</h2>", _legend(report)]
        parts += [_coloured(report, row, tokenizer, most) for row in range(len(report.tokens))]
    if any(report.rejected):
        parts += ["<h2>The rounds</h2>", _strip(report)]
    lines = "".join(f"<li>{escape(line)}</li>" for line in headlines(report))
    parts += ["<h2>The numbers</h2>", f"<ul>{lines}</ul>"]
    parts += map(_html_table, tables(report) if report.rounds else ())
    return "\n".join([f'<div class="csdraft"><style>{STYLE}{_level_style(report)}</style>', *parts, "</div>"])


def _basis(report: Report) -> str:
    """What the sentence's first figure is computed from."""
    source = report.speedup_from
    counts = f"{count(report.emitted, 'token')}, {count(report.target_calls, 'call')} of the target"
    return f"{source[0].upper()}{source[1:]} ({counts})."


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><caption>{escape(table.title)}</caption><tr>{head}</tr>{rows}</table></div>'


def _cell(cell: str | Bar) -> str:
    if isinstance(cell, Bar):
        return f'<td class="bar"><i style="width:{100 * cell.share:.1f}%"></i></td>'
    return f"<td>{escape(cell)}</td>"


def _level_style(report: Report) -> str:
    """CSS with each level's colour, lighter on a dark page."""
    rules, dark = [], []
    for level in range(1, len(report.level_names)):
        colour, line = PALETTE[(level - 1) % len(PALETTE)], LINES[(level - 1) % len(LINES)]
        tint = "background: color-mix(in srgb, var(--of) 28%, transparent)"
        rules += [
            f".csdraft .l{level} {{ --of: {colour}; }}",
            f".csdraft span.l{level} {{ {tint}; border-bottom: 3px {line} var(--of); }}",
        ]
        dark.append(f".csdraft .l{level} {{ --of: color-mix(in srgb, {colour} 65%, white); }}")
    return "\n".join([*rules, DARK.format(rules="\n".join(dark)), ""])


def _legend(report: Report) -> str:
    used = {level for row in report.levels for level in row}
    spans = [
        f'<span class="l{level}">{escape(name)}{" (no colour)" if level == 0 else ""}</span>'
        for level, name in enumerate(report.level_names)
        if level in used
    ]
    return f'<p class="legend">{"".join(spans)}Point at a token to see its level and its depth in the draft.</p>'


def _coloured(report: Report, row: int, tokenizer: PreTrainedTokenizerBase | None, most: int | None) -> str:
    """One row's text, with a span for each of its first `most` tokens; for all tokens if `most` is None."""
    tokens = report.tokens[row]
    depths = ((place, length) for length in report.lengths[row] for place in range(1, length + 1))
    spans = []
    for token, text, level, (depth, length) in islice(
        zip(tokens, _texts(tokens, tokenizer), report.levels[row], depths, strict=True), most
    ):
        title = f"{report.level_names[level]}, depth {depth} of {length} emitted in its round, token {token}"
        spans.append(f'<span class="l{level}" title="{escape(title, quote=True)}">{escape(text)}</span>')
    name = f"<h3>Row {row}</h3>" if len(report.tokens) > 1 else ""
    left = f"<p>and {count(len(tokens) - len(spans), 'more token')}</p>" if len(spans) < len(tokens) else ""
    return f"{name}<pre>{''.join(spans)}</pre>{left}"


def _texts(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    detokenizer = Detokenizer(tokenizer, special=True)
    texts = [detokenizer.push(token) for token in tokens]
    if texts:
        texts[-1] += detokenizer.flush()
    return texts


# The rounds.


def _rounds(report: Report) -> Iterator[tuple[int, list[int], list[tuple[int, int]]]]:
    """Of each round: its row, the levels of the drafted tokens that were kept, and (level, tokens) of the others."""
    for row, (levels, lengths, rejected) in enumerate(
        zip(report.levels, report.lengths, report.rejected, strict=True)
    ):
        start = 0
        for length, pairs in zip(lengths, rejected, strict=True):
            emitted, start = levels[start : start + length], start + length
            yield row, [level for level in emitted if level], pairs


def _strip(report: Report) -> str:
    """A block for each round with a cell for each drafted token, in its level's colour; filled if it was kept."""
    blocks = []
    for number, (row, kept, lost) in enumerate(islice(_rounds(report), MOST_ROUNDS), 1):
        where = f"row {row}, " if len(report.tokens) > 1 else ""
        drafted = len(kept) + sum(tokens for _, tokens in lost)
        title = f"round {number}: {where}{drafted} drafted, {len(kept)} kept"
        cells = [f'<i class="l{level}"></i>' for level in kept[:MOST_CELLS]]
        for level, tokens in lost:  # limited, since a file may state any number
            cells += [f'<i class="l{level} no"></i>'] * min(tokens, MOST_CELLS - len(cells))
        more = f"+{drafted - len(cells)}" if drafted > len(cells) else ""
        blocks.append(f'<span class="round" title="{escape(title)}">{"".join(cells)}{more}</span>')
    left = sum(map(len, report.lengths)) - len(blocks)
    key = "Each block is a round, each cell a drafted token: filled if the target kept it, hollow if not."
    more = f"<p>and {count(left, 'more round')}</p>" if left else ""
    return f'<p>{key}</p><div class="strip">{"".join(blocks)}</div>{more}'
