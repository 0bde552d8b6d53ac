"""Conversations through a tokenizer's chat template, and which of their tokens the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Message", "as_messages", "chat_prompt", "check_template", "scored_chat"]

Message = Mapping[str, Any]
"""`role` and `content`."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def check_template(tokenizer: Any, source: str) -> None:
    """Raises ValueError if the tokenizer cannot write conversations."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{source!r} holds conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template; use "
            "an instruction-tuned model's tokenizer, or data with 'prompt' and 'response'"
        )


def as_messages(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`{"from": "human", "value": ...}` becomes `{"role": "user", "content": ...}`; the latter stays as it is."""
    if not turns or "from" not in turns[0]:
        return [dict(turn) for turn in turns]
    return [{"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]


def chat_prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of the conversation up to its last user turn, and of the header that the assistant writes after."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError(
            f"a conversation of {len(messages)} turns has none of role 'user'; there is nothing to answer"
        )
    return _ids(messages[: users[-1] + 1], tokenizer, add_generation_prompt=True)


def scored_chat(messages: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and for each whether the assistant wrote it (1) or not (0).

    A template that marks the assistant's words with `{% generation %}` is believed. Otherwise a turn begins where the
    conversation before it, with the assistant's header, ends, and ends where the conversation up to it does. Where a
    template rewrites an earlier turn (some drop its reasoning), what it rewrote is not scored.
    """
    if GENERATION.search(tokenizer.get_chat_template()):
        made = tokenizer.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
        return list(made["input_ids"]), list(made["assistant_masks"])
    ids = _ids(messages, tokenizer)
    scored = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _shared(ids, _ids(messages[:turn], tokenizer, add_generation_prompt=True))
            end = _shared(ids, _ids(messages[: turn + 1], tokenizer))
            scored[start:end] = [1] * max(end - start, 0)
    return ids, scored


def _ids(messages: Sequence[Message], tokenizer: Any, **options: Any) -> list[int]:
    if not messages:
        return []
    return list(tokenizer.apply_chat_template(list(messages), return_dict=True, **options)["input_ids"])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
