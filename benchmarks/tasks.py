"""One target, many kinds of prompt: plain, transformers' prompt lookup, MaxGram and "auto", by task with intervals.

python -m benchmarks tasks --target MODEL --prompts spec=spec_bench.jsonl math=gsm8k_test.jsonl code=humaneval.jsonl
python -m benchmarks tasks --target MODEL --drafter HEAD --prompts code=humaneval.jsonl  # alone, on MaxGram, in "auto"

Prompts come from JSON lines files, .xz or not; each `category` of rows is a task of its own, and all rows of several
turns are the task "multi-turn", of which the first turn is asked. They go through the target's chat template, but for
the kind "code". All ways answer a prompt greedily, before the next prompt comes: plain first and last, the others in
turns between. A ratio is plain's time of a token (the mean of both) over a way's, prompt by prompt, since a text that
parts at a near-tie may end elsewhere. A cell has the median and its 95 % interval, and the last column is the noise.
"auto" and MaxGram keep what they learn from prompt to prompt. What was measured is kept in --out; the same command
goes on there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.answers import AGAIN, AUTO, CLOCKS, LOOKUP_LENGTH, PLAIN, answers, in_turns
from benchmarks.near_ties import Parting, parting
from benchmarks.never_loses import FIELDS, encode
from benchmarks.replays import TALK
from csdraft.bench import Prompt
from csdraft.cascade import CascadeDrafter
from csdraft.data.text import read_objects
from csdraft.decoding import clock
from csdraft.drafters.auto import Auto
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.hub import vocab_size
from csdraft.metrics.intervals import bootstrap_median
from csdraft.progress import Progress
from csdraft.tables.adjacency import AdjacencyTable
from csdraft.tables.outputs import OutputTable
from csdraft.version import __version__
from csdraft_command import COUNT

__all__ = ["WARM", "Question", "questions", "table"]

LOOKUP = "prompt lookup"
WAYS = (LOOKUP, "MaxGram", "auto")
ALONE, BELOW, JOINED = "drafter", "drafter and MaxGram", "auto with drafter"
"""Three more ways, with `--drafter`; the last is "auto" for a target with this drafter beside it."""
WARM = "Say hello, and then tell me in a few words what you can do."
Measured = dict[str, Any]
"""Of one prompt: `task`, `id`, `prompt` (its length), `tokens` of plain and auto, `wall` and `cpu` (seconds of a token
by way), `rounds`, and `parted`, the texts that are not plain generate's."""


@dataclass(frozen=True)
class Question:
    """A prompt: its task, a name that is its own, and its token ids."""

    task: str
    name: str
    ids: Prompt


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
        Question(task, rows[turn][1], as_prompt(tokenizer, rows[turn][0], rows[turn][2], longest))
        for turn in range(count)
        for task, rows in chosen.items()
        if turn < len(rows)
    ]


def as_prompt(tokenizer: Any, kind: str, text: str, longest: int) -> Prompt:
    return tuple(encode(tokenizer, kind, text, longest)[0].tolist())


def drafted_ways(target: Any, drafter: str | None) -> dict[str, dict[str, Any]]:
    """Way -> its arguments of `generate`; each has one drafter for all prompts, which learns as "auto" does."""
    ways = {LOOKUP: {"prompt_lookup_num_tokens": LOOKUP_LENGTH}, "MaxGram": {"assistant": MaxGram(), "reuse": False}}
    ways["auto"] = AUTO
    if drafter is not None:
        ways[ALONE] = {"assistant": ModelDrafter(drafter), "reuse": False}
        ways[BELOW] = {"assistant": CascadeDrafter([drafter, MaxGram()]), "reuse": False}
        own = {"adjacency": AdjacencyTable(vocab_size(target)), "outputs": OutputTable()}  # or it copies "auto"
        ways[JOINED] = {"assistant": Auto(drafter=ModelDrafter(drafter), **own), "reuse": False}
    return ways


def measured(target: Any, question: Question, number: int, tokens: int, drafted: Mapping[str, Any]) -> Measured:
    """Every way answers one prompt."""
    found = answers(target, question.ids, in_turns(drafted, number), tokens)
    plain = found[PLAIN].text
    apart = {way: parting(target, question.ids, plain, answer.text) for way, answer in found.items()}
    return {
        **{"task": question.task, "id": question.name, "prompt": len(question.ids)},
        "tokens": {way: len(found[way].text) for way in (PLAIN, "auto")},
        **{by: {way: answer.pace(by) for way, answer in found.items()} for by in CLOCKS},
        "rounds": {way: answer.report.rounds for way, answer in found.items() if answer.report is not None},
        "parted": {way: asdict(parted) for way, parted in apart.items() if parted is not None},
    }


def table(found: Sequence[Measured], by: str) -> str:
    """Markdown: a line a task, and one for all; then which texts were other ones."""
    head = ("Task", "Prompts", "Plain, tokens/s", *WAYS, f"auto over {LOOKUP}", "auto, least", "auto, tokens a round")
    if found and ALONE in found[0][by]:
        head += (ALONE, BELOW, JOINED, f"{BELOW} over {ALONE}", f"{JOINED} over {LOOKUP}")
    lines = [f"| {' | '.join(head)} | {AGAIN} over {PLAIN} |", "|---" * (len(head) + 1) + "|"]
    for task in (*dict.fromkeys(one["task"] for one in found), "all"):
        those = [one for one in found if task in (one["task"], "all")]
        lines.append(f"| {task} | {' | '.join(cells(those, by))} |")
    return "\n".join([*lines, "", *said_of_texts(found)])


def cells(those: Sequence[Measured], by: str) -> list[str]:
    """A task's line."""
    seconds = [one[by] for one in those]
    plain = [(s[PLAIN] + s[AGAIN]) / 2 for s in seconds]
    ratios = {way: [p / s[way] for p, s in zip(plain, seconds, strict=True)] for way in WAYS}
    tokens, rounds = (sum(one[what]["auto"] for one in those) for what in ("tokens", "rounds"))
    return [
        f"{len(those)}",
        f"{len(plain) / sum(plain):.1f}",
        *(interval(ratios[way]) for way in WAYS),
        interval([s[LOOKUP] / s["auto"] for s in seconds]),
        f"{min(ratios['auto']):.2f}",
        f"{tokens / rounds:.2f}",
        *(
            interval([p / s[way] for p, s in zip(plain, seconds, strict=True)])
            for way in (ALONE, BELOW, JOINED)
            if way in seconds[0]
        ),
        *(
            interval([s[slower] / s[way] for s in seconds])
            for slower, way in ((ALONE, BELOW), (LOOKUP, JOINED))
            if way in seconds[0]
        ),
        interval([s[PLAIN] / s[AGAIN] for s in seconds]),
    ]


def interval(ratios: Sequence[float]) -> str:
    return str(bootstrap_median([[ratio] for ratio in ratios]))


def said_of_texts(measured: Sequence[Measured]) -> list[str]:
    """A line, and one for each text that is not plain generate's."""
    other = [(f"{one['id']}, {way}", Parting(**at)) for one in measured for way, at in one["parted"].items()]
    if not other:
        return ["Every text was plain generate's."]
    ties = sum(found.tied for _, found in other)
    said = [f"* {where}: {found}" for where, found in other]
    return [f"{len(other)} texts are not plain generate's, {ties} of them parted at a near-tie:", *said]


def newest(folder: Path) -> float | None:
    """When a drafter's weights were last written; None for one of the Hub."""
    return max((file.stat().st_mtime for file in folder.glob("*.safetensors")), default=None)


def kept(out: Path, about: Mapping[str, Any]) -> list[Measured]:
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
    parser.add_argument("--drafter", help="a model or head, by folder or Hub id: alone, above MaxGram, in auto")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="KIND=FILE", help="JSON lines, also .xz")
    parser.add_argument("--count", type=COUNT, default=4, help="prompts of each task (default: %(default)s)")
    parser.add_argument("--tokens", type=COUNT, default=80, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--longest", type=COUNT, default=1200, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the target (default: %(default)s)")
    parser.add_argument("--threads", type=COUNT, default=1, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="of the table, and by which csdraft decides what pays: cpu on a busy machine, with one thread (default: "
        "%(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("out/tasks.jsonl"), help="default: %(default)s")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    clock.now = CLOCKS[options.clock]
    files = dict(pair.split("=", 1) for pair in options.prompts)
    about = {key: getattr(options, key) for key in ("dtype", "threads", "tokens", "longest", "clock")}
    about["compared"] = "by token"
    if options.drafter:
        about |= {"drafter": options.drafter, "weights": newest(Path(options.drafter)), "ways": [ALONE, BELOW, JOINED]}
    done = kept(options.out, {"target": Path(options.target).name, "csdraft": __version__, **about})
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    asked = questions(tokenizer, files, options.count, options.longest)
    names = {one["id"] for one in done}
    missing = [(number, one) for number, one in enumerate(asked) if one.name not in names]
    if missing:
        target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval()
        done += answered(target, tokenizer, missing, options)
    wanted = {one.name for one in asked}
    done = [one for one in done if one["id"] in wanted]
    print(table(done, options.clock))
    return 0 if all(Parting(**found).tied for one in done for found in one["parted"].values()) else 1


def answered(
    target: Any, tokenizer: Any, missing: Sequence[tuple[int, Question]], options: argparse.Namespace
) -> list[Measured]:
    """Answers what is missing, a line of the file a prompt; every way has run before the first is timed."""
    progress, made, drafted = Progress(), [], drafted_ways(target, options.drafter)
    warm = Question("", "", as_prompt(tokenizer, "", WARM, options.longest))
    measured(target, warm, 0, options.tokens, drafted)
    for turn, (number, question) in enumerate(missing, 1):
        found = measured(target, question, number, options.tokens, drafted)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        made.append(found)
        progress(question.name, turn / len(missing))
    return made
