"""One target, many kinds of prompt: plain, transformers' prompt lookup, MaxGram and "auto", by task with intervals.

python -m benchmarks tasks --target MODEL --prompts spec=spec_bench.jsonl math=gsm8k_test.jsonl code=humaneval.jsonl

Prompts come from JSON lines files, .xz or not; rows with a `category` are a task of their own each, those of several
turns together "multi-turn". They go through the target's chat template, but for the kind "code". All ways answer a
prompt greedily, before the next prompt comes: plain first and last, the others in turns between. A ratio is the mean of
the two plain times over a way's, prompt by prompt; a cell has the median and its 95 % interval, and the table ends with
what the two plain times say of each other. "auto" keeps what it learns, as it does by default. Answers are kept in --out; the same command goes on there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.near_ties import parting
from benchmarks.never_loses import FIELDS, encode
from benchmarks.replays import TALK
from csdraft.data.json_lines import read_objects
from csdraft.drafters.max_gram import MaxGram
from csdraft.metrics.intervals import bootstrap_median
from csdraft.progress import Progress
from csdraft.version import __version__

__all__ = ["Question", "questions", "table"]

LOOKUP_LENGTH = 10
"""Tokens a round of transformers' prompt lookup, as its documentation has it."""
PLAIN, AGAIN, LOOKUP, AUTO = "plain", "plain again", "prompt lookup", "auto"
WARM = "Say hello, and then tell me in a few words what you can do."
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Answers = dict[str, Any]
"""Of one prompt: `task`, `id`, `prompt` and `tokens` (lengths), `wall` and `cpu` (seconds by way), `rounds`, `parted`."""


@dataclass(frozen=True)
class Question:
    """A prompt: its task, a name that is its own, and its token ids, (1, length)."""

    task: str
    name: str
    ids: torch.Tensor


def questions(tokenizer: Any, files: Mapping[str, str], count: int, longest: int) -> list[Question]:
    """So many prompts of every task, from all over its file, in turns: one of each task, then the next of each.

    Args:
        files: by kind.
        count: prompts of a task.
        longest: tokens of a prompt; longer ones lose their end.
    """
    tasks: dict[str, list[tuple[str, str, str]]] = {}
    for kind, file in files.items():
        for number, row in enumerate(read_objects(file)):
            said = next((row[field] for field in FIELDS if field in row), None)
            if said is None:
                raise SystemExit(f"row {number} of {file} has none of the columns {', '.join(FIELDS)}; rename one")
            talk = not isinstance(said, str) and len(said) > 1
            part = TALK if talk else row.get("category")
            text = said if isinstance(said, str) else said[0]
            tasks.setdefault(kind if part is None else f"{kind}: {part}", []).append((kind, f"{kind} {number}", text))
    chosen = {task: rows[:: max(len(rows) // count, 1)][:count] for task, rows in tasks.items()}
    return [
        Question(task, rows[turn][1], encode(tokenizer, rows[turn][0], rows[turn][2], longest))
        for turn in range(count)
        for task, rows in chosen.items()
        if turn < len(rows)
    ]


def ways(number: int) -> dict[str, dict[str, Any]]:
    """Keywords of `generate` by way, in the order of prompt `number`."""
    drafted = [
        (LOOKUP, {"prompt_lookup_num_tokens": LOOKUP_LENGTH}),
        ("MaxGram", {"assistant": MaxGram(), "reuse": False}),  # all ways read the prompt
        (AUTO, {"assistant": "auto", "reuse": False}),
    ]
    turn = number % len(drafted)
    return {PLAIN: {}, **dict(drafted[turn:] + drafted[:turn]), AGAIN: {}}


def answer(target: Any, question: Question, number: int, tokens: int) -> Answers:
    """Every way answers one prompt."""
    seconds: dict[str, dict[str, float]] = {clock: {} for clock in CLOCKS}
    texts, rounds, length = {}, {}, question.ids.shape[1]
    for way, options in ways(number).items():
        if "assistant" in options:
            options = {**options, "return_dict_in_generate": True}
        began = {name: clock() for name, clock in CLOCKS.items()}
        made = target.generate(question.ids, max_new_tokens=tokens, do_sample=False, **options)
        for name, clock in CLOCKS.items():
            seconds[name][way] = clock() - began[name]
        if "assistant" in options:
            rounds[way], made = made.report.rounds, made.sequences
        texts[way] = made[0, length:].tolist()
    apart = {way: parting(target, question.ids[0].tolist(), texts[PLAIN], text) for way, text in texts.items()}
    parted = {way: found.to_dict() for way, found in apart.items() if found is not None}
    about = {"task": question.task, "id": question.name, "prompt": length, "tokens": len(texts[PLAIN])}
    return {**about, **seconds, "rounds": rounds, "parted": parted}


def table(answers: Sequence[Answers], clock: str) -> str:
    """Markdown: a line a task, and one for all; then which texts were other ones."""
    names = [way for way in answers[0][clock] if way not in (PLAIN, AGAIN)]
    names.sort(key=[LOOKUP, "MaxGram", AUTO].index)
    lines = [
        f"| Task | Prompts | Plain, tokens/s | {' | '.join(names)} | {AUTO} over {LOOKUP} | {AUTO}, least | "
        f"{AUTO}, tokens a round | {AGAIN} over {PLAIN} |",
        "|---" * (len(names) + 7) + "|",
    ]
    tasks = dict.fromkeys(a["task"] for a in answers)
    for task in (*tasks, "all"):
        those = [a for a in answers if task in (a["task"], "all")]
        seconds = [a[clock] for a in those]
        plain = [(s[PLAIN] + s[AGAIN]) / 2 for s in seconds]
        speed = sum(a["tokens"] for a in those) / sum(plain)
        ratios = {way: [p / s[way] for p, s in zip(plain, seconds, strict=True)] for way in names}
        cells = [interval(ratios[way]) for way in names]
        cells += [interval([s[LOOKUP] / s[AUTO] for s in seconds]), f"{min(ratios[AUTO]):.2f}"]
        cells += [f"{sum(a['tokens'] for a in those) / sum(a['rounds'][AUTO] for a in those):.2f}"]
        cells += [interval([s[AGAIN] / s[PLAIN] for s in seconds])]
        lines.append(f"| {task} | {len(those)} | {speed:.1f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *said_of_texts(answers)])


def interval(ratios: Sequence[float]) -> str:
    return str(bootstrap_median([[ratio] for ratio in ratios]))


def said_of_texts(answers: Sequence[Answers]) -> list[str]:
    """A line, and one for each text that is not plain generate's."""
    other = [(a, way, found) for a in answers for way, found in a["parted"].items()]
    ties = sum(found["tied"] for _, _, found in other)
    if not other:
        return ["Every text was plain generate's."]
    return [f"{len(other)} texts are not plain generate's, {ties} of them parted at a near-tie:"] + [
        f"* {a['id']}, {way}: token {found['at']}, top-2 logit gap {found['gap']:.2g}, rounding {found['rounding']:.2g}"
        for a, way, found in other
    ]


def kept(out: Path, about: Mapping[str, Any]) -> list[Answers]:
    """The answers that an earlier run with the same settings left; starts the file if there are none."""
    lines = out.read_text(encoding="utf-8").split("\n")[:-1] if out.is_file() else []  # without half a line
    if not lines:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(about) + "\n", encoding="utf-8")
        return []
    if (was := json.loads(lines[0])) != about:
        raise SystemExit(f"{out} holds answers of {was}, and now it is {about}; give another --out, or remove it")
    out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [json.loads(line) for line in lines[1:]]


def main(argv: Sequence[str]) -> int:
    """Prints the table; 1 if a text is not plain generate's, and not for a near-tie."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="a causal model's folder or Hub id")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="KIND=FILE", help="JSON lines, also .xz")
    parser.add_argument("--count", type=int, default=4, help="prompts of each task (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=80, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=1200, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the target (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of the table (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/tasks.jsonl"), help="default: %(default)s")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    files = dict(pair.split("=", 1) for pair in options.prompts)
    about = {key: getattr(options, key) for key in ("dtype", "threads", "tokens", "longest")}
    done = kept(options.out, {"target": Path(options.target).name, "csdraft": __version__, **about})
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    asked = questions(tokenizer, files, options.count, options.longest)
    names = {answers["id"] for answers in done}
    missing = [(number, one) for number, one in enumerate(asked) if one.name not in names]
    if missing:
        target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval()
        done += answered(target, tokenizer, missing, options)
    wanted = {one.name for one in asked}
    done = [answers for answers in done if answers["id"] in wanted]
    print(table(done, options.clock))
    return 0 if all(found["tied"] for answers in done for found in answers["parted"].values()) else 1


def answered(
    target: Any, tokenizer: Any, missing: Sequence[tuple[int, Question]], options: argparse.Namespace
) -> list[Answers]:
    """Answers what is missing, a line of the file a prompt; every way has run before the first is timed."""
    progress, made = Progress(), []
    answer(target, Question("", "", encode(tokenizer, "", WARM, options.longest)), 0, options.tokens)
    progress.restart()
    for turn, (number, question) in enumerate(missing, 1):
        found = answer(target, question, number, options.tokens)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        made.append(found)
        progress(question.name, turn / len(missing))
    return made


