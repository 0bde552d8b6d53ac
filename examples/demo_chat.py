"""The chat demo: a real model answers questions of four kinds in several ways, after a student of it was distilled.

The model is SmolLM2-135M-Instruct, from the Hub or from a package of PyPI. `make demo-chat` runs it.

    python -m examples.demo_chat
    python -m examples.demo_chat --model FOLDER          # a chat model of your own, with Llama's kind of layers
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.answers import AGAIN, AUTO, LOOKUP_LENGTH, PLAIN, Answer, answers, in_turns
from benchmarks.near_ties import Parting, parting
from benchmarks.pair import load_model
from benchmarks.tasks import WARM
from csdraft.bench import Prompt, aligned
from csdraft.cascade import CascadeDrafter
from csdraft.data.chat import chat_prompt
from csdraft.data.text import read_objects
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.suffix import Suffix
from csdraft.progress import Progress
from csdraft_command import COUNT
from examples.demo import colours_by_default, show_text, size
from examples.demo_chat_student import Student, distilled
from recipes.smollm2.get_model import FOLDER, get_model

__all__ = ["dtype_of_machine", "main"]

PROMPTS = "recipes/smollm2/prompts.jsonl"
SECONDS = 200.0
"""After so many no other round of questions, one of each kind, is begun."""
K_MATRIX = ((2, 8, 8), (0, 8, 8), (0, 0, 0))
"""Of the cascade [student, MaxGram, suffix], as recipes/smollm2/cascade.yaml has it."""
LABELS = {
    PLAIN: "generate()",
    "lookup": f"generate(prompt_lookup_num_tokens={LOOKUP_LENGTH})",
    "assisted": "generate(assistant_model=student)",
    "max_gram": "generate(assistant=MaxGram())",
    "student": "generate(assistant=student)",
    "cascade": "generate(assistant=CascadeDrafter)",
    "auto": 'generate(assistant="auto")',
    AGAIN: "generate() once more",
}
OWN, STOCK = ("max_gram", "student", "cascade", "auto"), ("lookup", "assisted")
PAYS, EVEN = 1.05, 0.98
"""Speed-ups from which on a way pays, and below which it costs more than it saves."""
WARM_TOKENS = 16


@dataclass(frozen=True)
class Asked:
    """One question and what all ways answered."""

    kind: str
    prompt: Prompt
    found: dict[str, Answer]

    def speedup(self, way: str) -> float:
        """Over the mean of the two plain calls, by the time of a token."""
        plain = (self.found[PLAIN].pace("wall") + self.found[AGAIN].pace("wall")) / 2
        return plain / self.found[way].pace("wall")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.demo_chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", help=f"folder of a chat model (default: {FOLDER}, made if it is not there)")
    made.add_argument("--prompts", default=PROMPTS, help='JSON lines of {"kind", "messages"} (default: %(default)s)')
    made.add_argument("--max-new-tokens", type=COUNT, default=64, help="default: %(default)s")
    made.add_argument("--count", type=COUNT, help="questions of each kind (default: what fits in three minutes)")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where the CPU has units")
    made.add_argument("--threads", type=COUNT, help="of torch (default: all cores)")
    made.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    made.add_argument("--no-distill", action="store_true", help="leave the student out")
    made.add_argument("--out", type=Path, default=Path("out/demo-chat"), help="folder for report.html and the student")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit status is 0 if every text was the same, or parted at a near-tie."""
    options, began = parser().parse_args(argv), time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    path = options.model or str(FOLDER)
    where = path if options.model else get_model()
    dtype = options.dtype or dtype_of_machine()
    tokenizer = AutoTokenizer.from_pretrained(path)
    target = load_model(path, torch.device("cpu"), getattr(torch, dtype))
    print(f"target  {where}: {size(target)}, {dtype}, {torch.get_num_threads()} threads", flush=True)
    student = None if options.no_distill else distilled(path, target, dtype, options.out)
    kinds = read_questions(tokenizer, options.prompts)
    answers(target, warm_up(tokenizer), in_turns(drafted(student), 0), WARM_TOKENS)
    asked = ask(target, kinds, drafted(student), options.max_new_tokens, options.count)

    show(tokenizer, asked, options.color == "always" or colours_by_default(options.color), options.out)
    print(table(asked))
    print("Speed-ups over generate(): the mean over the questions of a kind, each asked once.")
    same = say_texts(target, asked)
    say_verdict(asked, student)
    print(f"All of it took {time.perf_counter() - began:.0f} s, {where!r} included.")
    return 0 if same else 1


def dtype_of_machine() -> str:
    """bfloat16 where torch finds units that multiply it; elsewhere it is slower than float32."""
    units = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if any(units) else "float32"


def drafted(student: Student | None) -> dict[str, dict[str, Any]]:
    """Keywords of `generate` by way, without the plain ones."""
    found: dict[str, dict[str, Any]] = {"lookup": {"prompt_lookup_num_tokens": LOOKUP_LENGTH}}
    if student is not None:
        drafter = ModelDrafter(student.network, name="student")
        found["assisted"] = {"assistant_model": student.network}
        found["student"] = {"assistant": drafter}
        found["cascade"] = {"assistant": CascadeDrafter([drafter, MaxGram(), Suffix()], k_matrix=K_MATRIX)}
    return found | {"max_gram": {"assistant": MaxGram()}, "auto": AUTO}


def read_questions(tokenizer: Any, file: str) -> dict[str, list[Prompt]]:
    """Token ids through the chat template, by kind."""
    kinds: dict[str, list[Prompt]] = {}
    for row in read_objects(file):
        kinds.setdefault(row["kind"], []).append(tuple(chat_prompt(row["messages"], tokenizer)))
    return kinds


def warm_up(tokenizer: Any) -> Prompt:
    """What every way answers before anything is timed: none of the questions, whose answers are remembered."""
    return tuple(chat_prompt([{"role": "user", "content": WARM}], tokenizer))


def ask(
    target: Any, kinds: Mapping[str, Sequence[Prompt]], ways: Mapping[str, Any], tokens: int, count: int | None
) -> list[Asked]:
    """Asks one question of each kind, then the next of each, until so many of each are asked or the time is over."""
    rounds = list(zip(*kinds.values(), strict=False))[:count]
    print(f"Every question is answered in {len(ways) + 2} ways, in turns, greedily, with {tokens} tokens at most ...",
          flush=True)  # fmt: skip
    progress, made, began = Progress(), [], time.perf_counter()
    for turn, prompts in enumerate(rounds):
        for kind, prompt in zip(kinds, prompts, strict=True):
            made.append(Asked(kind, prompt, answers(target, prompt, in_turns(ways, len(made)), tokens)))
            asked, spent = len(made) / (len(rounds) * len(kinds)), time.perf_counter() - began
            progress("asking", asked if count is not None else min(max(asked, spent / SECONDS), 1.0))
        if count is None and (time.perf_counter() - began) * (turn + 2) / (turn + 1) > SECONDS:
            break
    progress.close()
    return made


def show(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], colour: bool, out: Path) -> None:
    """One answer of each kind, with each token in the colour of who drafted it; the last one as a page, too."""
    way = "cascade" if "cascade" in asked[0].found else "auto"
    for one in {one.kind: one for one in reversed(asked)}.values():
        report = one.found[way].report
        assert report is not None
        print(f"\n{one.kind}: {LABELS[way]}, {one.speedup(way):.2f}x")
        show_text(tokenizer, one.prompt, report, colour)
        out.mkdir(parents=True, exist_ok=True)
        report.to_html(out / f"report-{one.kind}.html", tokenizer)


def table(asked: Sequence[Asked]) -> str:
    """A line a way, a column a kind."""
    kinds = list(dict.fromkeys(one.kind for one in asked))
    rows: list[list[str]] = [["", "tokens/s", *kinds, "all", "tokens/round"]]
    for way in (way for way in LABELS if way in asked[0].found):
        speed = statistics.median(1 / one.found[way].pace("wall") for one in asked)
        means = [mean(asked, way, kind) for kind in kinds] + [mean(asked, way)]
        reports = [report for one in asked if (report := one.found[way].report) is not None]
        rounds = sum(report.rounds for report in reports)
        efficiency = f"{sum(report.emitted for report in reports) / rounds:.2f}" if rounds else ""
        rows.append([LABELS[way], f"{speed:.1f}", *(f"{value:.2f}x" for value in means), efficiency])
    return "\n" + aligned(rows)


def mean(asked: Sequence[Asked], way: str, kind: str | None = None) -> float:
    return statistics.fmean(one.speedup(way) for one in asked if kind in (None, one.kind))


def say_texts(target: Any, asked: Sequence[Asked]) -> bool:
    """Compares every text with plain generate's; True if none differs, or all that do part at a near-tie."""
    other: list[tuple[str, Parting]] = []
    for one in asked:
        for way, answer in one.found.items():
            found = parting(target, one.prompt, one.found[PLAIN].text, answer.text)
            if found is not None:
                other.append((f"{one.kind}, {LABELS[way]}", found))
    texts = sum(len(one.found) for one in asked)
    if not other:
        print(f"\nAll {texts} texts are plain generate's, token for token: checked, not assumed.")
        return True
    tied = sum(found.tied for _, found in other)
    print(f"\n{len(other)} of {texts} texts leave plain generate's, {tied} at a near-tie, where rounding decides:")
    for name, found in other:
        print(f"  {name}: {found}")
    return tied == len(other)


def say_verdict(asked: Sequence[Asked], student: Student | None) -> None:
    """What pays and what does not."""
    gains = {way: mean(asked, way) for way in (*OWN, *STOCK) if way in asked[0].found}
    best, stock = (max((way for way in group if way in gains), key=lambda way: gains[way]) for group in (OWN, STOCK))
    if student is not None:
        before, after = (graded["block_efficiency"] for graded in (student.before, student.after))
        print(f"\nDistilling: the target wrote {student.tokens[0]:,} tokens, and {student.tokens[1]:,} were read. On "
              f"held-out questions a draft gave {before:.2f} tokens a round before and {after:.2f} after.\n"
              f"A forward of the student costs {student.share:.2f} of the target's.")  # fmt: skip
    print(
        f"Fastest here: {LABELS[best]}, {gains[best]:.2f}x; transformers' best {LABELS[stock]}, {gains[stock]:.2f}x."
    )
    groups = {"Pays": [], "Makes no difference": [], "Does not pay": []}
    for way, gain in gains.items():
        verdict = "Pays" if gain >= PAYS else "Makes no difference" if gain >= EVEN else "Does not pay"
        groups[verdict].append(f"{LABELS[way]} {gain:.2f}x")
    for verdict, found in groups.items():
        if found:
            print(f"{verdict}: {', '.join(found)}.")
    print("\nTo try next: recipes/smollm2/README.md, the same with a student that is trained for longer.")


if __name__ == "__main__":
    sys.exit(main())
