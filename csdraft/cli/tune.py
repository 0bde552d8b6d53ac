"""Find the cascade for your models and prompts: which drafters, the K matrix, lenience, tree size, schedule.

The target writes once on every prompt, every drafter is compared with it place by place, and each K matrix is replayed
on those texts with measured seconds. The best are then timed against plain generate, side by side, and the table shows
both figures: what was expected of the whole matrix each round at lenience 1, and what was measured. Of cascades within
3 % of the fastest, a strict one is chosen, and one that leaves lengths to the cost model. Below the table stands which
rows cannot be told apart from the fastest. All of it keeps to --minutes, as far as prompts can be left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from csdraft.cascade import CascadeDrafter
from csdraft.cli._models import Opened, add_model_arguments, add_prompts_arguments, open_models, prompts_of_file
from csdraft.decoding.interfaces import Drafter
from csdraft.decoding.names import name_of
from csdraft.drafters.model import ModelDrafter
from csdraft.progress import Progress
from csdraft.trees.best_first import BestFirst
from csdraft.tune import Candidate, preferred, tune

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_prompts_arguments(parser, limit=12)
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--finalists", type=int, default=4, metavar="N", help="plans to time (default 4)")
    parser.add_argument("--lenience-values", type=float, nargs="+", default=[1.0, 2.0], metavar="X")
    parser.add_argument(
        "--tree-nodes",
        type=int,
        nargs="*",
        default=[16],
        metavar="N",
        help="sizes of trees to try with each model (default 16); no number leaves trees out",
    )
    parser.add_argument("--repetitions", type=int, default=2, metavar="N")
    parser.add_argument(
        "--minutes", type=float, default=3.0, metavar="M", help="time for all of it (default 3); more is surer"
    )
    parser.add_argument("--save", metavar="PATH", help="save the fastest as a cascade")


def run(args: argparse.Namespace) -> int:
    opened = open_models(args)
    drafters = candidates(opened, args.tree_nodes)
    prompts = [tuple(ids) for ids in prompts_of_file(opened, args.prompts, args, args.limit)]
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    options = sampling if args.temperature else {"do_sample": False}
    options |= {"max_new_tokens": args.max_new_tokens}
    if opened.target.generation_config.pad_token_id is None:
        opened.target.generation_config.pad_token_id = opened.tokenizer.pad_token_id or opened.tokenizer.eos_token_id
    print(f"tuning takes at most about {args.minutes:g} min (--minutes), after models are loaded", file=sys.stderr)
    limits = (args.finalists, args.lenience_values, args.repetitions)
    found = tune(opened.target, drafters, prompts, *limits, Progress(), args.minutes, **options)
    print(table(found, [label(drafter) for drafter in drafters]))
    print(f"\n{how_sure(found, len(prompts))}")
    best = preferred(found)
    print(f"chosen: {best.k_matrix}, lenience {best.options['lenience']:g}, {best.options['schedule']}")
    dropped = [label(drafter) for j, drafter in enumerate(drafters) if j not in best.kept]
    if dropped:
        print(f"left out: {', '.join(dropped)}")
    if any(one.expected.speedup > one.expected.tokens_per_round for one in found):
        print("expected speed-ups above tokens a round: the machine was busy meanwhile, do not believe them")
    if best.measured.median <= 1:
        print("nothing beats plain generate on these prompts: leave assistant= out")
    if args.save:
        best.cascade.save_pretrained(args.save, opened.tokenizer, opened.target)
        print(f"saved: {args.save}")
    return 0


def candidates(opened: Opened, tree_nodes: Sequence[int]) -> list[Drafter]:
    """The drafters to choose from: those that were named, and each model once more with each size of tree."""
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


def label(drafter: Drafter) -> str:
    if isinstance(drafter, ModelDrafter):
        name = drafter.name or name_of(drafter.network)
        return name if drafter.tree is None else f"{name} {drafter.tree}"
    return type(drafter).__name__


def how_sure(found: Sequence[Candidate], prompts: int) -> str:
    """What was timed, and which rows of the table may be as fast as the first.

    Args:
        found: the fastest first.
        prompts: that there are.
    """
    first, *others = found
    times = "once" if first.repetitions == 1 else f"{first.repetitions} times"
    said = f"timed on {first.prompts} of {prompts} prompts, {times} each, up to {first.tokens} tokens"
    if not others:
        return f"{said}; there was one candidate"
    same = [str(row) for row, one in enumerate(others, 2) if not one.told_apart]
    if not same:
        return f"{said}; row 1 is faster than every other row"
    rows = f"row{'s' if len(same) > 1 else ''} {', '.join(same)}"
    return f"{said}; {rows} cannot be told apart from row 1: more --minutes, --repetitions or prompts could"


def table(found: Sequence[Candidate], labels: Sequence[str]) -> str:
    """Markdown, the fastest measured first; expectations are those of the whole matrix each round, lenience 1."""
    lines = [
        "| drafters | k_matrix | lenience | schedule | tokens a round, expected | speed-up expected | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        names = ", ".join(labels[j] for j in one.kept)
        options, expected = one.options, one.expected
        lines.append(
            f"| {names} | {one.k_matrix} | {options['lenience']:g} | {options['schedule']} "
            f"| {expected.tokens_per_round:.2f} | {expected.speedup:.2f} | {one.measured} |"
        )
    return "\n".join(lines)
