"""Turns the conversations of data sets, in their various formats, into the messages that chat templates read.

A message has `role` and `content`; an assistant's may have `tool_calls` instead, or reasoning as well. A key whose
value is null counts as missing, as in transformers from 5.24 on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from csdraft import stored
from csdraft.data.tally import Unusable

__all__ = ["Message", "as_messages", "as_tools", "in_parts", "is_broken", "kind_of", "says_something", "text_of_parts"]

Message = Mapping[str, Any]
"""`role` and `content`."""

SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Roles by their names in ShareGPT's format, and in that of tools that write it."""

SURROGATE = re.compile("[\ud800-\udfff]")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which transformers knows an assistant's reasoning."""


def as_messages(turns: Any) -> list[dict[str, Any]]:
    """A conversation's messages; raises `Unusable` if something is wrong with it.

    Args:
        turns: a list of `{"role": ..., "content": ...}` or of ShareGPT's `{"from": ..., "value": ...}`; that list as
            JSON text; or an object of lists, as in older data sets.
    """
    turns = _unzipped(_from_json(turns))
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise Unusable(f"{kind_of(turns)} in place of a conversation")
    if not turns:
        raise Unusable("an empty conversation")
    return [_message(turn) for turn in turns]


def as_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Descriptions of tools for a chat template, from a list of objects or its JSON text; None if it is empty."""
    tools = _from_json(tools)
    if tools is None or tools == "" or tools == []:
        return None
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise Unusable(f"{kind_of(tools)} in place of a list of tools")
    if other := [tool for tool in tools if not isinstance(tool, Mapping)]:
        raise Unusable("a tool that is not an object", kind_of(other[0]))
    return [dict(tool) for tool in tools]


def kind_of(value: Any) -> str:
    """A value's type in JSON's terms, for messages."""
    if value is None:
        return "null"
    names = ((str, "text"), (bool, "true or false"), (int | float, "a number"), (Mapping, "an object"))
    found = (name for kind, name in names if isinstance(value, kind))
    return next(found, "a list" if isinstance(value, Sequence) else stored.kind_of(value))


def is_broken(text: str) -> bool:
    """Whether a text has half a character, such as JSON can hold of a cut emoji; tokenizers refuse it."""
    return not text.isascii() and SURROGATE.search(text) is not None


def in_parts(message: Message) -> bool:
    """Whether the content is a list of text parts."""
    content = message.get("content")
    return (
        isinstance(content, list)
        and bool(content)
        and all(_is_part(part) and part["type"] == "text" and isinstance(part.get("text"), str) for part in content)
    )


def text_of_parts(message: Message) -> dict[str, Any]:
    """The message with its text parts joined by line breaks."""
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


def says_something(message: Message) -> bool:
    """Whether an assistant's message has text, reasoning or tool calls."""
    texts = [message.get(name) for name in ("content", *REASONING)]
    texts += [part["text"] for part in message["content"]] if in_parts(message) else []
    return "tool_calls" in message or any(isinstance(text, str) and text.strip() for text in texts)


def _from_json(value: Any) -> Any:
    """The list that a JSON text holds; anything else unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _unzipped(turns: Any) -> Any:
    """Turns `{"role": [...], "content": [...]}` into a list of objects."""
    if not isinstance(turns, Mapping) or not turns or not all(isinstance(column, list) for column in turns.values()):
        return turns
    if len({len(column) for column in turns.values()}) != 1:
        raise Unusable("a conversation whose lists differ in length", ", ".join(turns))
    return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise Unusable("a turn that is not an object", kind_of(turn))
    message = {name: value for name, value in turn.items() if value is not None}
    speaker, said = message.pop("from", None), message.pop("value", None)
    speaker = message.get("role", speaker)
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if role == "tool" and "role" in message:
        role = speaker  # GLM's templates know `observation`
    if not isinstance(role, str) or not role:
        raise Unusable("a turn without a role", kind_of(role))
    message["role"] = role
    if "content" not in message and said is not None:
        message["content"] = said
    said = message.get("content")
    if speaker == "function_call" and isinstance(said, str) and (calls := _called(said)):
        message = {"role": role, "tool_calls": calls}
    return _with_content(_with_calls(message))


def _called(said: str) -> list[dict[str, Any]]:
    """LLaMA-Factory's tool calls: JSON text of `{"name": ..., "arguments": ...}` or of a list of them; else empty."""
    try:
        calls = json.loads(said)
    except (ValueError, RecursionError):
        return []
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """The message with `tool_calls` as templates read them: arguments are objects, and an empty list has no key."""
    old = message.pop("function_call", None)
    calls = _from_json(message.pop("tool_calls", [{"type": "function", "function": old}] if old else []))
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable("tool calls that are not a list of objects")
    return {**message, "tool_calls": [_call(call) for call in calls]}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: value for name, value in call.items() if value is not None}
    if isinstance(made.get("function"), Mapping):
        made["function"] = _call(made["function"])
    if isinstance(text := made.get("arguments"), str):  # JSON text in OpenAI's API, objects in templates
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            return made
        made["arguments"] = arguments if isinstance(arguments, dict) else text
    return made


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message with text or text parts as content; an assistant may have none, a tool may return anything."""
    role, content = message["role"], message.get("content")
    if content is None or content == []:
        if role not in ("assistant", "tool"):
            raise Unusable(f"{_a(role)} turn without content")
        kept = {name: value for name, value in message.items() if name != "content"}
        return kept if role == "assistant" else {**kept, "content": ""}
    if isinstance(content, str):
        if is_broken(content):
            raise Unusable(f"half a character in {_a(role)} turn")
        return message
    if isinstance(content, list) and (role != "tool" or all(_is_part(part) for part in content)):
        return {**message, "content": [_text_part(part) for part in content]}
    if role == "tool":
        return message
    raise Unusable(f"{kind_of(content)} as the content of {_a(role)} turn")


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("type"), str)


def _text_part(part: Any) -> dict[str, str]:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    if not isinstance(part, Mapping):
        raise Unusable("content in parts that are not objects", kind_of(part))
    kind = part.get("type") or ("text" if part.get("text") is not None else "nameless")
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise Unusable(f"{_a(kind)} part" if kind not in TEXT_PARTS else "a text part without text")


def _a(noun: Any) -> str:
    return f"{'an' if str(noun)[:1].lower() in ('a', 'e', 'i', 'o') else 'a'} {noun}"
