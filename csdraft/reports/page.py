"""A report as a web page and in a notebook: a sentence, the text coloured by level, its rounds, and the tables.

`page.html` is the template. The page needs no script, no other file and no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csdraft.reports.detokenizer import Detokenizer
from csdraft.reports.view import count, headlines, sentence, tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from csdraft.reports.report import Report

__all__ = ["page"]

TEMPLATE = Path(__file__).with_name("page.html")
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
LINES = ("solid", "dashed", "dotted", "double")
"""Each level has a colour and a kind of underline. The colours are Okabe and Ito's, for colour-blind readers too."""
MOST_ROUNDS, MOST_CELLS = 120, 40
"""The most rounds that are drawn, and the most tokens of one round."""
IN_A_NOTEBOOK = 400
"""Tokens of a row that a notebook shows. It stores what it shows, so all of a long text would make its file large."""


def page(report: Report, tokenizer: PreTrainedTokenizerBase | None = None, notebook: bool = False) -> str:
    """A whole page with all of the last call's text; for a notebook part of a page, with the start of a long text."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    written = range(len(report.tokens)) if any(report.tokens) else ()
    used = {level for row in report.levels for level in row}
    rounds = list(islice(_rounds(report), MOST_ROUNDS)) if any(report.rejected) else []
    looks = zip(cycle(PALETTE), cycle(LINES), report.level_names[1:], strict=False)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        whole=not notebook,
        sentence=sentence(report),
        levels=[(level, colour, line) for level, (colour, line, _) in enumerate(looks, 1)],
        used=[(level, name) for level, name in enumerate(report.level_names) if level in used],
        rows=[_row(report, row, tokenizer, IN_A_NOTEBOOK if notebook else None) for row in written],
        rounds=rounds,
        rounds_left=sum(map(len, report.lengths)) - len(rounds),
        headlines=headlines(report),
        tables=tables(report) if report.rounds else [],
        count=count,
    )


def _row(report: Report, row: int, tokenizer: PreTrainedTokenizerBase | None, most: int | None) -> dict[str, Any]:
    """One row's first `most` tokens, all if that is None, and how many are left."""
    tokens = report.tokens[row]
    depths = ((place, length) for length in report.lengths[row] for place in range(1, length + 1))
    every = zip(tokens, _texts(tokens, tokenizer), report.levels[row], depths, strict=True)
    shown = [
        {
            "text": text,
            "level": level,
            "title": f"{report.level_names[level]}, depth {depth} of {length} emitted in its round, token {token}",
        }
        for token, text, level, (depth, length) in islice(every, most)
    ]
    return {"tokens": shown, "left": len(tokens) - len(shown)}


def _texts(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    detokenizer = Detokenizer(tokenizer, special=True)
    texts = [detokenizer.push(token) for token in tokens]
    if texts:
        texts[-1] += detokenizer.flush()
    return texts


def _rounds(report: Report) -> Iterator[dict[str, Any]]:
    """Of each round: a title, and a cell for each drafted token, with its level; " no" if it was not kept."""
    number = 0
    for row, (levels, lengths, rejected) in enumerate(
        zip(report.levels, report.lengths, report.rejected, strict=True)
    ):
        start = 0
        for length, lost in zip(lengths, rejected, strict=True):
            number, end = number + 1, start + length
            kept = [level for level in levels[start:end] if level]
            start = end
            cells = [(level, "") for level in kept[:MOST_CELLS]]
            for level, tokens in lost:  # limited, since a file may state any number
                cells += [(level, " no")] * min(tokens, MOST_CELLS - len(cells))
            drafted = len(kept) + sum(tokens for _, tokens in lost)
            where = f"row {row}, " if len(report.tokens) > 1 else ""
            title = f"round {number}: {where}{drafted} drafted, {len(kept)} kept"
            yield {"title": title, "cells": cells, "more": drafted - len(cells)}
