"""From files of prompts and outputs to tables of block efficiency by task: what `scripts/replay.py` runs."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csdraft.decoding.interfaces import Drafter, Schedule
from csdraft.metrics.intervals import Interval, bootstrap_ratio
from csdraft.replay import Recording, replay

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
