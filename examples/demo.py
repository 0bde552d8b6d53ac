"""The demo: distils a drafter, then a real model completes real prompts in several ways, side by side.

It writes the same text each time. `make demo` runs it.

    python -m examples.demo
    python -m examples.demo --target me/large --drafter me/small --prompts prompts.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.figures import Figures, figures
from benchmarks.measure import Run, measure
from benchmarks.methods import K_MATRIX, METHODS, Setup, build
from benchmarks.pair import (
    DRAFTER,
    PROMPTS,
    TARGET,
    TUNE_PROMPTS,
    load_model,
    load_tokenizer,
    read_prompts,
    tokenized,
)
from csdraft.amounts import count_text
from csdraft.bench import Cell, Method, Prompt, configured, generate
from csdraft.cascade import CascadeDrafter
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.progress import Progress
from csdraft.reports.detokenizer import Detokenizer
from csdraft.reports.report import Report
from csdraft.schedules.fixed import Fixed
from csdraft_command import COUNT
from examples.demo_distill import distilled_pair

__all__ = ["main"]

LABELS = {
    "plain": "generate()",
    "hf_assisted_default": "generate(assistant_model=drafter)",
    "hf_prompt_lookup": "generate(prompt_lookup_num_tokens=10)",
    "drafter": "generate(assistant=drafter)",
    "auto": 'generate(assistant="auto")',
    "max_gram": "generate(assistant=MaxGram())",
    "cascade": "generate(assistant=CascadeDrafter)",
    "own_before": "own drafter before distilling",
    "own_after": "own drafter after distilling",
    "own_cascade": "CascadeDrafter with own drafter",
}
OWN = ("drafter", "auto", "max_gram", "cascade", "own_after", "own_cascade")
LOOKUP_LENGTH = 10
OWN_DEPTH = 3
"""Tokens a round that the target's own drafter writes, before and after distilling, whether it pays or not."""
SECONDS, MOST_PROMPTS, REPETITIONS = 100.0, 5, 2
"""About what the measurement may take: it sets how many prompts are used."""
TRIAL_TOKENS, LEAST_TOKENS = 16, 24
COLOURS = ("", "30;46", "30;43", "30;45", "30;42")
"""ANSI codes by level: the target's own tokens have no colour."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--target", default=TARGET, help="path or Hub id (default: %(default)s)")
    made.add_argument("--drafter", default=DRAFTER, help="path or Hub id (default: %(default)s)")
    made.add_argument("--prompts", default=PROMPTS, help='FILE.jsonl of {"id", "prompt"} (default: %(default)s)')
    made.add_argument("--max-new-tokens", type=COUNT, default=96)
    made.add_argument("--count", type=COUNT, help=f"prompts to complete (default: what fits, {MOST_PROMPTS} at most)")
    made.add_argument("--threads", type=COUNT, help="of torch (default: one or all cores, whichever is faster)")
    made.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    made.add_argument(
        "--layers",
        type=int,
        nargs="*",
        help="of the target, that its own drafter is made of (default: first and last)",
    )
    made.add_argument("--no-distill", action="store_true", help="leave the training out")
    made.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for report.html and the drafter")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit status is 0 if every text was the same."""
    options = parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    progress = Progress()
    progress("loading the models", 0.0)
    setup, tokenizer = load(options)
    prompts = tokenized(tokenizer, read_prompts(options.prompts))
    setup, count = settle(setup, prompts[0], options.threads, options.count)
    methods = build([name for name in LABELS if name in METHODS], setup)
    if not options.no_distill and (options.target == TARGET or options.layers):  # a large target would take hours
        layers = options.layers or sorted({0, setup.target.config.num_hidden_layers - 1})
        pair = distilled_pair(options.target, setup.target, layers, TUNE_PROMPTS, options.out)
        methods += own_methods(setup, *pair)
    cells = [Cell(method) for method in methods]
    chosen = prompts[:: max(len(prompts) // count, 1)][:count]
    introduce(setup, options, len(chosen), len(cells))
    run = measure(setup, cells, chosen, REPETITIONS, progress)

    found = [figures(run, cell.name, "plain", "plain") for cell in cells]
    shown, report = showpiece(run)
    show_text(tokenizer, chosen[shown], report, options.color == "always" or colours_by_default(options.color))
    show_table(found)
    options.out.mkdir(parents=True, exist_ok=True)
    report.to_html(options.out / "report.html", tokenizer)
    same = all(not f.different for f in found)
    say_verdict(found, same, options.out / "report.html")
    return 0 if same else 1


def load(options: argparse.Namespace) -> tuple[Setup, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(options.target)
    target, drafter = (
        load_model(path, torch.device("cpu"), torch.float32) for path in (options.target, options.drafter)
    )
    if target.generation_config.pad_token_id is None:
        target = configured(target, pad_token_id=tokenizer.eos_token_id)
    generating = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    return Setup(target, generating, drafter=drafter, depth=LOOKUP_LENGTH, k_matrix=K_MATRIX), tokenizer


def settle(setup: Setup, prompt: Prompt, threads: int | None, count: int | None) -> tuple[Setup, int]:
    """Sets the threads, by trying if not told; returns the number of prompts that there is time for, and of tokens."""
    seconds = {number: trial(setup, prompt, number) for number in ([threads] if threads else {1, os.cpu_count() or 1})}
    fastest = min(seconds, key=lambda number: seconds[number])
    torch.set_num_threads(fastest)
    tokens = setup.options["max_new_tokens"]
    affordable = SECONDS / len(LABELS) / seconds[fastest]  # calls of plain generate, of so many tokens
    if affordable < REPETITIONS + 2:  # not even one prompt: shorten it
        tokens = max(LEAST_TOKENS, int(tokens * affordable / (REPETITIONS + 2)))
    fitting = max(1, min(MOST_PROMPTS, int((affordable - 1) / (REPETITIONS + 1))))
    return replace(setup, options={**setup.options, "max_new_tokens": tokens}), count or fitting


def trial(setup: Setup, prompt: Prompt, threads: int) -> float:
    """Seconds that plain generate would take for one completion, going by a short one."""
    torch.set_num_threads(threads)
    short = replace(setup, options={**setup.options, "max_new_tokens": TRIAL_TOKENS})
    plain = Cell(build(["plain"], short)[0])
    generate(short, plain, [prompt])
    return generate(short, plain, [prompt]).seconds * setup.options["max_new_tokens"] / TRIAL_TOKENS


def own_methods(setup: Setup, before: PreTrainedModel, after: PreTrainedModel) -> list[Method]:
    """What a drafter did before it was distilled, and does now, alone and in a cascade.

    Alone it drafts as much before as after: the default schedule would not let a drafter draft that is of no use.
    """
    schedule = Fixed(OWN_DEPTH)
    old, new = (ModelDrafter(model, name="own drafter") for model in (before, after))
    return [
        Method("own_before", {"assistant": old, "schedule": schedule}),
        Method("own_after", {"assistant": new, "schedule": schedule}),
        Method("own_cascade", {"assistant": CascadeDrafter([new, MaxGram()], k_matrix=setup.k_matrix)}),
    ]


def introduce(setup: Setup, options: argparse.Namespace, count: int, ways: int) -> None:
    print(f"target  {options.target}: {size(setup.target)}")
    print(f"drafter {options.drafter}: {size(setup.drafter)}")
    print(
        f"Completing {count} prompts in {ways} ways, once to look and {REPETITIONS} times timed, in turns, greedily, "
        f"{setup.options['max_new_tokens']} tokens, {torch.get_num_threads()} threads ...",
        flush=True,
    )


def size(model: PreTrainedModel) -> str:
    layers = model.config.num_hidden_layers
    return f"{count_text(model.num_parameters())} parameters, {layers} layer{'s' * (layers != 1)}"


def showpiece(run: Run) -> tuple[int, Report]:
    """The prompt to show, by number, with the cascade's report: the one whose text the levels share most evenly."""
    reports = {look.group: look.report for look in run.looks if look.cell == "cascade" and look.report is not None}
    commonest = {group: max(Counter(report.levels[0]).values()) for group, report in reports.items()}
    shown = min(commonest, key=lambda group: commonest[group] / len(reports[group].levels[0]))
    return shown, reports[shown]


def colours_by_default(choice: str) -> bool:
    return choice == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ


def show_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, report: Report, colour: bool) -> None:
    """The end of a prompt, and its completion with each token in the colour of who drafted it."""
    before = tokenizer.decode(list(prompt)).splitlines()[-6:]
    print("\n--- the end of a prompt, and how the cascade went on " + "-" * 47)
    print(painted("\n".join(before), "2" if colour else ""), end="")
    pieces = Detokenizer(tokenizer, after=prompt)
    for token, level in zip(report.tokens[0], report.levels[0], strict=True):
        print(painted(pieces.push(token), COLOURS[level % len(COLOURS)] if colour else ""), end="")
    print(pieces.flush() + "\n" + "-" * 100)
    counts = [report.levels[0].count(level) for level in range(len(report.level_names))]
    words = [
        painted(f" {name} {counts[level]} ", COLOURS[level % len(COLOURS)] if colour else "")
        for level, name in enumerate(report.level_names)
    ]
    print(f"tokens of this text by who drafted them: {' '.join(words)}")


def painted(text: str, code: str) -> str:
    """Text in an ANSI colour; line by line, so that a colour never fills the rest of a line."""
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if code and line else line for line in text.split("\n"))


def show_table(found: Sequence[Figures]) -> None:
    """One line a way."""
    print(f"\n{'':38}{'tokens/s':>9}{'speed-up':>10}{'tokens/round':>14}  {'text':12}drafted tokens kept")
    for f in found:
        kept = ", ".join(f"{name} {share:.0%}" for name, share in (f.acceptance or {}).items())
        text = "the same" if not f.different else "DIFFERENT"
        numbers = f"{f.tokens_per_second:>9.1f}{f.speedup.median:>9.2f}x{f.block_efficiency or 0:>14.2f}"
        print(f"{LABELS[f.name]:38}{numbers}  {text:12}{kept}")
    print("Medians: tokens/s over all calls, speed-up over calls against plain's on the same prompt in the same turn.")


def say_verdict(found: Sequence[Figures], same: bool, page: Path) -> None:
    """What it comes to, and what to try next."""
    by_name = {f.name: f for f in found}
    if "own_after" in by_name:
        old, new = by_name["own_before"], by_name["own_after"]
        print(f"\nDistilling: drafting {OWN_DEPTH} tokens a round, the target's own drafter gave "
              f"{old.block_efficiency:.2f} tokens a round before and {new.block_efficiency:.2f} after, "
              f"{old.speedup.median:.2f}x and {new.speedup.median:.2f}x plain generate.")  # fmt: skip
    best = max((f for f in found if f.name in OWN), key=lambda f: f.speedup.median)
    stock = max((f for f in found if f.name.startswith("hf_")), key=lambda f: f.speedup.median)
    if same:
        print("\nEvery way wrote the same text, token for token, on every prompt: checked, not assumed.")
    else:
        print("\nSome texts differ, which in float32 must not happen; please report this.")
    print(f"Fastest here: {LABELS[best.name]}, {best.speedup.median:.2f}x plain generate; "
          f"transformers' best {stock.speedup.median:.2f}x.")  # fmt: skip
    print(f"The coloured text as a page: {page}\n")
    print("To try next (first: source .venv/bin/activate):")
    print("  csdraft generate --target models/smol-target --drafter models/smol-drafter --drafter max_gram \\")
    print("      --prompt 'def main(' --color                               your own prompt, drawn as it is drafted")
    print("  make bench                                                    the same with intervals, JSON and a plot")
    print("  python -m examples.demo --target YOUR/MODEL --drafter A/SMALLER-ONE   any pair that shares a tokenizer")
    print("  docs/quickstart.md                                            the same in your own program")


if __name__ == "__main__":
    sys.exit(main())
