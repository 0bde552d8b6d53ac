"""`csdraft bench`: times all ways to generate that the named models allow."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from csdraft.bench import Cell, Method, Prompt, Run, Setup, aligned, encode, equality, measure, ratio
from csdraft.cascade import CascadeDrafter
from csdraft.cli._models import Opened, label, open_models, prompts_of_file, sampling
from csdraft.decoding.interfaces import Drafter
from csdraft.decoding.names import distinct
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.progress import Progress
from csdraft.reports.report import Report

__all__ = ["run"]

LOOKUP_LENGTH = 10
"""Tokens that transformers' prompt lookup drafts each round; the number in its documentation."""
HEAD = ("method", "tokens/s", "first ms", "speed-up [95 %]", "tokens/round", "text")


def run(args: argparse.Namespace) -> int:
    """Prints the table. Returns 1 if a greedy text is not plain generate's."""
    logging.set_verbosity_error()  # hides warnings about the options of transformers' own methods
    opened = open_models(args)
    prompts: list[Prompt] = [tuple(ids) for ids in prompts_of_file(opened, args.prompts, args, args.limit)]
    options = sampling(args.temperature, top_k=0, top_p=1.0) | {"max_new_tokens": args.max_new_tokens}
    setup = Setup(opened.target, options)
    cells = [Cell(method, args.batch_size) for method in methods(opened, args.batch_size)]
    reports: defaultdict[str, Report] = defaultdict(lambda: Report(calls=0))

    def look(cell: Cell, group: Sequence[Prompt], index: int) -> None:
        if cell.method.drafted:
            asked = options | cell.method.options | {"reuse": False, "return_dict_in_generate": True}
            reports[cell.name] += opened.target.generate(**encode(setup, group), **asked).report

    found = measure(setup, cells, prompts, args.repetitions, Progress(), look)
    efficiency = {name: report.block_efficiency for name, report in reports.items()}
    return show(found, cells, efficiency, greedy=not args.temperature)


def methods(opened: Opened, rows: int) -> list[Method]:
    """All methods that these models allow. Transformers' own drafting supports single prompts only."""
    assistant = opened.assistant
    named: list[Drafter] = [] if assistant is None else [assistant]
    if isinstance(assistant, CascadeDrafter):
        named = list(assistant.drafters)
    found: list[tuple[str, dict[str, Any]]] = [("plain", {})]
    if rows == 1:
        models = [d.network for d in named if isinstance(d, ModelDrafter) and not d.taps()]
        if models and models[0].config.vocab_size == opened.target.config.vocab_size:
            found.append(("transformers, assistant_model", {"assistant_model": models[0]}))
        found.append(("transformers, prompt lookup", {"prompt_lookup_num_tokens": LOOKUP_LENGTH}))
    if MaxGram() not in named:
        named.append(MaxGram())
    found += [(label(drafter), {"assistant": drafter}) for drafter in named]
    if isinstance(assistant, CascadeDrafter):
        found.append(("cascade", {"assistant": assistant}))
    elif len(named) > 1:
        found.append(("cascade", {"assistant": CascadeDrafter(named)}))
    names = distinct(name for name, _ in found)
    return [Method(name, options) for name, (_, options) in zip(names, found, strict=True)]


def show(run: Run, cells: Sequence[Cell], efficiency: dict[str, float], greedy: bool) -> int:
    """Prints one line for each method. Returns 1 if a greedy text is not plain generate's."""
    plain, unequal = cells[0].name, False
    rows: list[tuple[str, ...]] = [HEAD]
    for cell in cells:
        samples: list[Any] = [sample for sample in run.samples if sample.cell == cell.name]
        same, different = equality(run.texts, cell.name, plain)
        unequal = unequal or (greedy and bool(different))
        text = f"{same}/{same + len(different)} equal" + (" DIFFERENT" if different else "")
        firsts = [1000 * sample.first for sample in samples if sample.first is not None]
        rows.append(
            (
                cell.method.name,
                f"{statistics.median(sample.rate for sample in samples):,.1f}",
                f"{statistics.median(firsts):.1f}" if firsts else "",
                str(ratio(run, cell.name, plain)),
                f"{efficiency[cell.name]:.2f}" if cell.name in efficiency else "",
                text if greedy else "",
            )
        )
    print(aligned(rows))
    if unequal:
        print("\nSome texts differ from plain generate's. `csdraft check` says whether rounding explains it.")
    return int(unequal)
