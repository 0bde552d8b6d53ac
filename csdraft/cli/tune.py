"""`csdraft tune`: prints a table of cascades, expected and measured, and saves the best."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from csdraft.cascade import CascadeDrafter
from csdraft.cli._models import Opened, label, open_models, prompts_of_file, sampling
from csdraft.decoding.interfaces import Drafter
from csdraft.decoding.names import distinct
from csdraft.drafters.model import ModelDrafter
from csdraft.hub import check_free
from csdraft.progress import Progress
from csdraft.trees.best_first import BestFirst
from csdraft.tune import Candidate, preferred, tune

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    if args.save:
        check_free(Path(args.save))  # now, and not after minutes
        above = next(place for place in (Path(args.save), *Path(args.save).absolute().parents) if place.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise ValueError(f"--save {args.save}: {str(above)!r} is not a folder that can be written to")
    opened = open_models(args)
    drafters = candidates(opened, args.tree_nodes)
    prompts = [tuple(ids) for ids in prompts_of_file(opened, args.prompts, args, args.limit)]
    options = sampling(args.temperature, top_k=0, top_p=1.0) | {"max_new_tokens": args.max_new_tokens}
    print(f"tuning takes at most about {args.minutes:g} min (--minutes), after models are loaded", file=sys.stderr)
    limits = (args.finalists, args.lenience_values, args.repetitions)
    found = tune(opened.target, drafters, prompts, *limits, Progress(), args.minutes, **options)
    names = distinct(map(label, drafters))
    print(table(found, names))
    print(f"\n{how_sure(found, len(prompts))}")
    best = preferred(found)
    print(f"chosen: {best.plan.trimmed()}, lenience {best.options['lenience']:g}, {best.options['schedule']}")
    dropped = [name for j, name in enumerate(names) if j not in best.plan.kept]
    if dropped:
        print(f"left out: {', '.join(dropped)}")
    if any(one.plan.expected.speedup > one.plan.expected.tokens_per_round for one in found):
        print("some expected speed-ups are above tokens a round: the machine was busy, so they are wrong")
    if best.measured.median <= 1:
        print("nothing beats plain generate on these prompts: leave assistant= out")
    if args.save:
        best.cascade.save_pretrained(args.save, opened.tokenizer, opened.target)
        print(f"saved: {args.save}")
    return 0


def candidates(opened: Opened, tree_nodes: Sequence[int]) -> list[Drafter]:
    """The named drafters, and for each model further ones that draft trees of these sizes."""
    assistant = opened.assistant
    if assistant is None:
        raise ValueError("nothing to tune: name drafters with --drafter, largest first")
    named = list(assistant.drafters) if isinstance(assistant, CascadeDrafter) else [assistant]
    found: list[Drafter] = []
    for drafter in named:
        found.append(drafter)
        if isinstance(drafter, ModelDrafter) and drafter.tree is None:
            found += [ModelDrafter(drafter.network, tree=BestFirst(nodes=nodes)) for nodes in tree_nodes]
    return found


def how_sure(found: Sequence[Candidate], prompts: int) -> str:
    """A line that says what was timed of how many prompts, and which rows of the table may be as fast as the first."""
    first, *others = found
    times = "once" if first.repetitions == 1 else f"up to {first.repetitions} times"
    timed = f"timed on {first.prompts} of {prompts} prompts, {times} each, up to {first.tokens} tokens"
    if not others:
        return f"{timed}; there was one candidate"
    same = [str(row) for row, one in enumerate(others, 2) if not one.told_apart]
    if not same:
        return f"{timed}; row 1 is faster than every other row"
    rows = f"row{'s' if len(same) > 1 else ''} {', '.join(same)}"
    return f"{timed}; {rows} cannot be told apart from row 1: more --minutes, --repetitions or prompts could"


def table(found: Sequence[Candidate], labels: Sequence[str]) -> str:
    """A Markdown table, the fastest first. Expected figures are for drafts of the whole matrix at lenience 1."""
    lines = [
        "| drafters | k_matrix | lenience | schedule | tokens a round, expected | speed-up expected | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        names = ", ".join(labels[j] for j in one.plan.kept)
        options, expected = one.options, one.plan.expected
        lines.append(
            f"| {names} | {one.plan.trimmed()} | {options['lenience']:g} | {options['schedule']} "
            f"| {expected.tokens_per_round:.2f} | {expected.speedup:.2f} | {one.measured} |"
        )
    return "\n".join(lines)
