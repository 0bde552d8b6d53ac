"""Writes conversations with a tokenizer's chat template, and finds the tokens that the assistant wrote.

A drafter must be trained on what it will see in decoding. So one value, `ChatFormat`, holds the template and its
options wherever conversations are read: writing data, training, evaluation and the command line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from csdraft.data.messages import Message, as_tools, in_parts, says_something, text_of_parts
from csdraft.data.tally import Unusable
from csdraft.data.text import read_utf8

__all__ = ["ChatFormat", "chat_prompt", "check_template", "scored_chat"]

T = TypeVar("T")
Tools = Sequence[Mapping[str, Any]] | None

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CALLS = re.compile(r"\btool_calls\b")
PROBE = "csdraft7probe"
TAKEN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
OURS = {"messages", *TAKEN} - {"tools", "documents", "kwargs"}
"""Arguments of `apply_chat_template` that users cannot set as options."""


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become tokens.

    Attributes:
        template: Jinja text, or the name of one of the tokenizer's templates; None is the tokenizer's own.
        options: what the template reads besides messages, such as `enable_thinking`, `tools` or `documents`. A row's
            own tools replace these.
    """

    template: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, template: str | None = None, options: Mapping[str, Any] | None = None) -> ChatFormat:
        """The format that a user's settings describe; the template may be a file, too.

        Raises:
            ValueError: there is no such file, or the options cannot be given to a template.
        """
        options = {} if options is None else options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise ValueError(
                f"chat_template_options={options!r} must be what a template reads, as {{enable_thinking: false}}"
            )
        if taken := sorted(OURS & options.keys()):
            raise ValueError(
                f"chat_template_options has {', '.join(taken)}, which csdraft sets itself; leave it out, and give a "
                "template as chat_template"
            )
        try:
            tools = {"tools": as_tools(options["tools"])} if "tools" in options else {}
        except Unusable as error:
            raise ValueError(f"chat_template_options has {error}; give a list of JSON schemas as tools") from error
        return cls(None if template is None else _template_text(template), {**options, **tools})

    def tools_of(self, tools: Tools) -> Tools:
        """A row's own tools, or else those of the options."""
        return self.options.get("tools") if tools is None else tools


def _template_text(template: str) -> str:
    if not isinstance(template, str):
        raise ValueError(f"chat_template={template!r} must be a file's path, or a template's text or name")
    if _is_jinja(template):
        return template
    path = Path(template)
    if path.is_file():
        return read_utf8(path)
    if path.suffix or len(path.parts) != 1:
        raise ValueError(f"chat_template={template!r}: there is no such file; give the path of a Jinja template")
    return template


def _is_jinja(template: str) -> bool:
    return "{%" in template or "{{" in template


def check_template(tokenizer: Any, what: str, chat: ChatFormat | None = None) -> None:
    """Raises ValueError if the tokenizer cannot write conversations.

    Args:
        what: why a template is needed, such as "'chats.jsonl' holds conversations".
    """
    chat = chat or ChatFormat()
    if chat.template is None and not tokenizer.chat_template:
        raise ValueError(
            f"{what}, but the tokenizer {tokenizer.name_or_path!r} has no chat template; give one (--chat-template "
            "FILE, a script's chat_template=FILE), take a chat model, or data with 'prompt' and 'response'"
        )
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chat.template is not None and not _is_jinja(chat.template) and chat.template not in named:
        raise ValueError(
            f"chat_template={chat.template!r} is no file, no Jinja text and no name of one of the tokenizer's "
            f"templates ({', '.join(named) or 'it has no named ones'}); give one of these"
        )
    template = _Template(tokenizer, chat)
    if unread := [name for name in chat.options if not re.search(rf"\b{re.escape(name)}\b", template.text)]:
        raise ValueError(
            f"chat_template_options has {', '.join(unread)}, which the chat template does not read; correct the name, "
            "or leave it out"
        )
    try:
        template.render([{"role": "user", "content": PROBE}], tokenize=False)
    except Unusable as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            raise ValueError(f"the chat template is not valid Jinja: {error.__cause__}; fix it") from error


def chat_prompt(
    messages: Sequence[Message], tokenizer: Any, chat: ChatFormat | None = None, tools: Tools = None
) -> list[int]:
    """Token ids of the conversation up to its last user turn, followed by the header of the assistant's answer.

    Raises:
        Unusable: there is no user turn, or the template cannot write the conversation.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise Unusable("no user turn")
    template = _Template(tokenizer, chat or ChatFormat(), tools)
    asked = template.fitted(messages[: users[-1] + 1])
    return _filled_if_needed(asked, lambda turns: template.ids(turns, add_generation_prompt=True))


def scored_chat(
    messages: Sequence[Message], tokenizer: Any, chat: ChatFormat | None = None, tools: Tools = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and for each of them whether the assistant wrote it (1) or not (0).

    A template that marks the assistant's words with `{% generation %}` decides itself. With other templates, a turn
    is what the conversation up to it has after the conversation before it and the assistant's header. A turn's tokens
    are not scored if the template rewrites them later (some drop an earlier turn's reasoning). An empty turn, and an
    assistant's turn that begins a conversation, are not scored either: in decoding, nothing asks for them.

    Raises:
        Unusable: no token is scored, or the template cannot write the conversation.
    """
    if all(message["role"] != "assistant" for message in messages):
        raise Unusable("no assistant turn")
    if not any(says_something(message) for message in messages if message["role"] == "assistant"):
        raise Unusable("only empty assistant turns")
    template = _Template(tokenizer, chat or ChatFormat(), tools)
    ids, scored = _filled_if_needed(template.fitted(messages), template.scored)
    if 1 not in scored:
        raise Unusable("no assistant turn that the chat template writes after a question")
    return ids, scored


@dataclass(frozen=True)
class _Template:
    """A tokenizer's chat template, with the tools of one conversation."""

    tokenizer: Any
    chat: ChatFormat
    tools: Tools = None

    @property
    def text(self) -> str:
        return self.tokenizer.get_chat_template(self.chat.template, self.chat.tools_of(self.tools))

    def fitted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with their text parts joined unless the template takes parts; `Unusable` if calls get lost."""
        if any("tool_calls" in message for message in messages) and not CALLS.search(self.text):
            raise Unusable("tool calls, which the chat template does not write")
        if not any(map(in_parts, messages)) or self.takes_parts():
            return list(messages)
        return [text_of_parts(message) if in_parts(message) else message for message in messages]

    def takes_parts(self) -> bool:
        """Whether the template writes the parts' text, rather than fails or writes them as a Python list."""
        message = {"role": "user", "content": [{"type": "text", "text": PROBE}]}
        try:
            text = _Template(self.tokenizer, self.chat).render([message], tokenize=False)
        except Unusable:
            return False
        return PROBE in text and "'text'" not in text and '"text"' not in text

    def scored(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """See `scored_chat`."""
        marked = GENERATION.search(self.text) is not None
        if marked:
            made = self.render(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, scored = list(made["input_ids"]), list(made["assistant_masks"])
        else:
            ids = self.ids(messages)
            scored = [0] * len(ids)
        end = -1
        for turn, message in enumerate(messages):
            counts = turn > 0 and says_something(message)
            if message["role"] == "assistant" and (not marked or not counts):
                try:
                    asked, told = self.ids(messages[:turn], add_generation_prompt=True), self.ids(messages[: turn + 1])
                except Unusable:
                    if marked:
                        raise
                    continue  # some templates write nothing before a user's turn
                before, start, end = end, _shared(ids, asked), _shared(ids, told)
                # The template may write the question otherwise once it is answered; only its header may differ.
                if start < len(asked) and start < _shared(asked, self.ids(messages[:turn])) - 1:
                    counts = False
                # A turn that begins within the assistant's last one follows another text here than in decoding.
                scored[start:end] = [int(counts and start > before)] * max(end - start, 0)
        return ids, scored

    def ids(self, messages: Sequence[Message], **options: Any) -> list[int]:
        return list(self.render(messages, return_dict=True, **options)["input_ids"]) if messages else []

    def render(self, messages: Sequence[Message], **options: Any) -> Any:
        """`apply_chat_template`; `Unusable` with the template's own message if it refuses or fails."""
        given = {**self.chat.options, "tools": self.chat.tools_of(self.tools), "chat_template": self.chat.template}
        try:
            return self.tokenizer.apply_chat_template(list(messages), **given, **options)
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise Unusable("a conversation that the chat template cannot write", str(error)) from error


def _filled_if_needed(messages: Sequence[Message], write: Callable[[Sequence[Message]], T]) -> T:
    """The result of `write`; if it fails, of `write` with empty content in messages that have none."""
    try:
        return write(messages)
    except Unusable:
        if all("content" in message for message in messages):
            raise
        return write([{"content": "", **message} for message in messages])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
