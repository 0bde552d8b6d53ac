"""Block efficiency, by task, of drafters without a model on texts that a model wrote earlier; the model is not needed.

    python -m benchmarks replay --pairs outputs.jsonl --tokenizer TOKENIZER
    python -m benchmarks replay --questions question.jsonl --answers answers.jsonl.xz --tokenizer TOKENIZER \\
        --chat vicuna --drafters max_gram '{"type": "prompt_lookup", "max_ngram": 3}' --recorded eagle.jsonl.xz

--pairs has JSON lines {"prompt": ..., "output": ..., "task": ...}, each text or token ids. --questions and --answers
are FastChat's files (MT-bench, Spec-Bench). Without --drafters: all of csdraft's own that can be made as they come
and that run no model. The texts should have been written greedily.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.replay import NotRecorded, Recording, replay
from csdraft import spec
from csdraft.decoding.interfaces import Drafter, Schedule
from csdraft.metrics.intervals import Interval, bootstrap_ratio
from csdraft.schedules.fixed import Fixed
from csdraft_command import COUNT

__all__ = ["CHATS", "Yield", "measure", "read_answers", "read_pairs", "read_rounds", "table"]

CHATS = {
    "vicuna": "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. {% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }} {% else %}ASSISTANT: {{ message.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
}
"""Chat templates of models whose tokenizers have none."""
TALK = "multi-turn"
OVERALL = "overall"


@dataclass(frozen=True)
class Yield:
    """What came of the texts of one group.

    Attributes:
        task, group: of its recordings.
        emitted, rounds, accepted: tokens, target calls, and those of the tokens that had been drafted.
    """

    task: str
    group: str
    emitted: int
    rounds: int
    accepted: int


def _rows(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, .xz or not."""
    packed = Path(path).read_bytes()
    text = (lzma.decompress(packed) if Path(path).suffix == ".xz" else packed).decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_pairs(path: str | Path, tokenizer: Any) -> list[Recording]:
    """Recordings from a JSON-lines file of `{"prompt": ..., "output": ..., "task": ...}`; texts, or lists of ids.

    An output given as text is taken to have ended with the tokenizer's end-of-text token.
    """
    recordings = []
    for row in _rows(path):
        prompt, output = row["prompt"], row["output"]
        if isinstance(prompt, str):
            prompt = tokenizer(prompt).input_ids
        if isinstance(output, str):
            output = [*tokenizer(output, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        recordings.append(Recording(tuple(prompt), tuple(output), row.get("task", "all"), str(row.get("group", ""))))
    return recordings


def read_answers(
    questions: str | Path, answers: str | Path, tokenizer: Any, template: str | None = None
) -> list[Recording]:
    """Recordings from FastChat's files (MT-bench, Spec-Bench): questions with turns, and a model's answers to them.

    Answers keep no tokens: they are encoded again. One whose `new_tokens` say that there was no end-of-text token had
    been cut by a limit.

    Args:
        template: the chat template; the tokenizer's own if None.
    """
    asked = {row["question_id"]: row for row in _rows(questions)}
    recordings = []
    for row in _rows(answers):
        question, choice = asked[row["question_id"]], row["choices"][0]
        task = TALK if len(question["turns"]) > 1 else question["category"]
        talk: list[dict[str, str]] = []
        for turn, (said, answer) in enumerate(zip(question["turns"], choice["turns"], strict=True)):
            talk.append({"role": "user", "content": said})
            ids = tokenizer.apply_chat_template(
                talk, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            output = tokenizer(answer, add_special_tokens=False).input_ids
            if "new_tokens" not in choice or choice["new_tokens"][turn] != len(output):
                output = [*output, tokenizer.eos_token_id]
            recordings.append(Recording(tuple(ids), tuple(output), task, str(row["question_id"])))
            talk.append({"role": "assistant", "content": answer})
    return recordings


def read_rounds(questions: str | Path, answers: str | Path) -> list[Yield]:
    """What another method yielded while it wrote the answers, from the `accept_lengths` in their file."""
    asked = {row["question_id"]: row for row in _rows(questions)}
    found = []
    for row in _rows(answers):
        question, lengths = asked[row["question_id"]], row["choices"][0]["accept_lengths"]
        task = TALK if len(question["turns"]) > 1 else question["category"]
        found.append(Yield(task, str(row["question_id"]), sum(lengths), len(lengths), sum(lengths) - len(lengths)))
    return found


def measure(
    recordings: Sequence[Recording],
    drafter: Drafter,
    vocab: int,
    eos: Iterable[int],
    schedule: Schedule | None = None,
) -> list[Yield]:
    """What a drafter yields on every recording."""
    reports = replay(recordings, drafter, vocab, eos, schedule)
    return [
        Yield(r.task, r.group or str(i), report.emitted, report.rounds, report.target.accepted.total())
        for i, (r, report) in enumerate(zip(recordings, reports, strict=True))
    ]


def _by_task(found: Iterable[Yield]) -> dict[str, dict[str, list[int]]]:
    """task -> group -> [emitted, rounds, accepted], and all of them as a task of their own."""
    sums: dict[str, dict[str, list[int]]] = {}
    for each in found:
        for task in (each.task, OVERALL):
            total = sums.setdefault(task, {}).setdefault(each.group, [0, 0, 0])
            for i, value in enumerate((each.emitted, each.rounds, each.accepted)):
                total[i] += value
    sums[OVERALL] = sums.pop(OVERALL, {})  # the last row
    return sums


def table(results: Mapping[str, Sequence[Yield]], accepted: bool = False) -> str:
    """A Markdown table: tokens a round, by task and method, each with its 95 % bootstrap interval over groups.

    Args:
        results: method -> what it yielded; the methods may have written different texts of the same tasks.
        accepted: drafted tokens kept a round instead, the model's own not counted.
    """
    columns = {method: _by_task(found) for method, found in results.items()}
    tasks = dict.fromkeys(task for column in columns.values() for task in column if task != OVERALL)
    lines = [f"| Task | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for task in [*tasks, OVERALL]:
        cells = [str(_ratio(column[task].values(), accepted)) if task in column else "" for column in columns.values()]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(groups: Iterable[Sequence[int]], accepted: bool) -> Interval:
    emitted, rounds, kept = zip(*groups, strict=True)
    return bootstrap_ratio(kept if accepted else emitted, rounds)


def load_tokenizer(path: str, eos: str) -> PreTrainedTokenizerFast:
    """From a folder, a Hub id or a tokenizer.json, which does not say what ends a text."""
    if path.endswith(".json"):
        return PreTrainedTokenizerFast(tokenizer_file=path, bos_token="<s>", eos_token=eos)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def drafters(wanted: Sequence[str] | None) -> Iterator[tuple[str, Drafter]]:
    """Name and drafter, from types or JSON; all that come without options and models if None are named."""
    for text in wanted or spec.types("drafters"):
        try:
            drafter = spec.resolve("drafters", json.loads(text) if text.startswith("{") else text)
        except (TypeError, ValueError) as reason:
            if wanted:
                raise SystemExit(f"--drafters {text}: {reason}") from reason
            print(f"{text}: left out ({reason})")
            continue
        yield text, drafter


def main(argv: Sequence[str]) -> None:
    """Replays every drafter and prints both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", help="prompts and outputs")
    parser.add_argument("--questions", help="FastChat's questions")
    parser.add_argument("--answers", help="a model's answers to them")
    parser.add_argument("--recorded", nargs="*", default=[], help="answers of other methods, with accept_lengths")
    parser.add_argument("--tokenizer", required=True, help="a folder, a Hub id or a tokenizer.json")
    parser.add_argument("--eos", default="</s>", help="the end-of-text token of a tokenizer.json")
    parser.add_argument("--chat", help=f"chat template: {', '.join(CHATS)}, or a file; the tokenizer's own by default")
    parser.add_argument("--drafters", nargs="*", help="types or JSON")
    parser.add_argument("--depth", type=COUNT, help="draft tokens a round; as many as a drafter likes by default")
    parser.add_argument("--limit", type=COUNT, help="texts of each task")
    parser.add_argument("--json", help="a file for the counts of every group")
    options = parser.parse_args(argv)

    tokenizer: Any = load_tokenizer(options.tokenizer, options.eos)
    if (options.pairs is None) == (options.answers is None) or (options.answers is None) != (
        options.questions is None
    ):
        parser.error("give --pairs, or --questions and --answers")
    if options.pairs:
        recordings = read_pairs(options.pairs, tokenizer)
    else:
        chat = options.chat and (CHATS.get(options.chat) or Path(options.chat).read_text())
        recordings = read_answers(options.questions, options.answers, tokenizer, chat)
    if options.limit:
        tasks = {task: [r for r in recordings if r.task == task] for task in dict.fromkeys(r.task for r in recordings)}
        recordings = [r for found in tasks.values() for r in found[: options.limit]]
    print(f"{len(recordings)} texts, {sum(len(r.output) for r in recordings)} tokens")

    schedule = None if options.depth is None else Fixed(options.depth)
    results = {Path(path).name.split(".jsonl")[0]: read_rounds(options.questions, path) for path in options.recorded}
    for name, drafter in drafters(options.drafters):
        started = time.perf_counter()
        try:
            results[name] = measure(recordings, drafter, len(tokenizer), [tokenizer.eos_token_id], schedule)
        except NotRecorded as reason:
            print(f"{name}: left out ({reason})")
            continue
        print(f"{name}: {time.perf_counter() - started:.1f} s")
    print(
        f"\nTokens a round [95 %]\n\n{table(results)}\n\nDrafted tokens kept a round [95 %]\n\n{table(results, True)}"
    )
    if options.json:
        rows = {name: [vars(each) for each in found] for name, found in results.items()}
        Path(options.json).write_text(json.dumps(rows) + "\n")
