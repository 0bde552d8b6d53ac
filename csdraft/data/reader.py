"""Examples of a source, made into rows of token ids one batch at a time; what cannot be used says why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from csdraft.data.chat import ChatFormat, scored_chat
from csdraft.data.messages import as_messages, as_tools, is_broken, kind_of
from csdraft.data.opening import GIVEN, TOOLS, Source
from csdraft.data.tally import Tally, Unusable, attempt

__all__ = [
    "OUTCOME",
    "Encoded",
    "RowReader",
    "conversation_of",
    "count",
    "opened",
    "text_of",
    "tokens_of",
    "without_filled",
]

OUTCOME = ("source_row", "cut", "left_out", "detail")
"""Columns that say what became of an example; see `RowReader`."""


class Encoded(NamedTuple):
    """An example as tokens, before it is cut."""

    ids: list[int]
    prompt_length: int = 0
    more: Mapping[str, Any] = {}


# One example's values, checked.


def text_of(value: Any, what: str) -> str:
    """A text that is not null; `Unusable` for anything else.

    Args:
        what: it is, such as "response".
    """
    if value is None:
        raise Unusable(f"no {what}")
    if not isinstance(value, str):
        raise Unusable(f"{kind_of(value)} as {what}")
    if is_broken(value):
        raise Unusable(f"half a character in its {what}")
    return value


def conversation_of(value: Any) -> list[dict[str, Any]]:
    """The messages of a conversation that is not null."""
    if value is None:
        raise Unusable("a null conversation")
    return as_messages(value)


def _are_whole(ids: list[Any]) -> TypeGuard[list[int]]:
    return all(type(token) is int for token in ids)


def tokens_of(example: Mapping[str, Any], number: int, source: Source, tokenizer: Any) -> Encoded:
    """Token ids that a source already has.

    Raises:
        ValueError: they are of another tokenizer.
    """
    ids = example.get(source.column)
    if ids is None:
        raise Unusable("no tokens")
    if not isinstance(ids, list):
        raise Unusable(f"{kind_of(ids)} in place of tokens")
    # Where one row has a fraction, Arrow makes fractions of all rows' numbers.
    ids = [int(token) if type(token) is float and token.is_integer() else token for token in ids]
    if not _are_whole(ids):
        raise Unusable("tokens that are not whole numbers")
    if len(ids) and not 0 <= min(ids) <= max(ids) < len(tokenizer):
        foreign = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"row {number} of {source.name!r} has token {foreign} in {source.column!r}, and the tokenizer has "
            f"{len(tokenizer)} tokens; the data was made with another tokenizer: make it again with this one"
        )
    given = {name: value for name in GIVEN if (value := example.get(name)) is not None}
    for name in given.keys() & {"prompt_length", "index"}:
        if type(given[name]) is not int or given[name] < 0:
            raise Unusable(f"{kind_of(given[name])} as {name}", f"{given[name]}: it counts from 0")
    if "scored" in given and not (
        isinstance(given["scored"], list) and all(each in (0, 1) for each in given["scored"])
    ):
        raise Unusable(f"{kind_of(given['scored'])} as scored", "it is a list of 0 and 1")
    if len(scored := given.get("scored", ids)) != len(ids):
        raise Unusable("a scored list that is not as long as its tokens", f"{len(scored)} for {len(ids)}")
    return Encoded(ids, given.pop("prompt_length", 0), given)


def without_filled(value: Any, feature: Any) -> Any:
    """A value of a `datasets.Dataset` without the nulls that Arrow fills into objects of differing keys.

    A column of the type Json has none: its nulls were in the file, and stay.
    """
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [without_filled(each, inner) for each in value]
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {name: without_filled(each, feature.get(name)) for name, each in value.items() if each is not None}
    return value


def opened(ids: list[int], tokenizer: Any) -> list[int]:
    """Begins with the begin-of-text token, where the tokenizer has one but leaves it to the user."""
    start = tokenizer.bos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def _closed(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


# Batches of examples.


@dataclass(frozen=True)
class RowReader:
    """Examples of a source to rows; called by `datasets.Dataset.map` with batches and the examples' numbers.

    An example gives one row, a long text several. One that cannot be used gives a row without tokens whose `left_out`
    and `detail` say why, so that the counts are kept wherever rows are.
    """

    source: Source
    tokenizer: Any
    max_length: int
    chat: ChatFormat
    version: int = 3
    """To be raised whenever rows change: `datasets` keeps the rows of readers that look equal."""

    @property
    def columns(self) -> list[str]:
        """Of the rows, without `OUTCOME`."""
        scored = ("scored",) if self.source.turns else ()
        given = [name for name in ("scored", "index") if name in self.source.columns]
        return ["input_ids", "prompt_length", *scored, *given]

    def __call__(self, batch: Mapping[str, list], numbers: Sequence[int]) -> dict[str, list]:
        columns = {name: batch[name] for name in self.source.columns}
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = list(self.rows(examples, numbers))
        return {name: [row[name] for row in rows] for name in (*self.columns, *OUTCOME)}

    def rows(self, examples: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows of the examples, in their order, with all of `columns` and `OUTCOME`."""
        values = [attempt(self._checked, pair) for pair in zip(examples, numbers, strict=True)]
        encoded = iter(self._encoded([value for value in values if not isinstance(value, Unusable)]))
        for number, value in zip(numbers, values, strict=True):
            found = value if isinstance(value, Unusable) else next(encoded)
            try:
                if isinstance(found, Unusable):
                    raise found
                yield from self._pieces(found, number)
            except Unusable as why:
                yield self._row(number, Encoded([]), left_out=why.what, detail=why.detail)

    def _checked(self, pair: tuple[Mapping[str, Any], int]) -> Any:
        """What of an example is made into tokens."""
        example, number = pair
        features = self.source.features
        if features is not None and self.source.kind in ("chat", "prompt"):
            example = {name: without_filled(value, features[name]) for name, value in example.items()}
        value = example.get(self.source.column)
        answer = example.get(self.source.response or "")
        if self.source.kind == "tokens":
            return tokens_of(example, number, self.source, self.tokenizer)
        if self.source.turns:
            return self._turns(conversation_of(value), answer), as_tools(example.get(TOOLS))
        text = text_of(value, "prompt" if self.source.kind == "prompt" else "text")
        if self.source.response is not None:
            return text, _response_of(answer)
        if not text:
            raise Unusable(f"an empty {self.source.kind}")
        return text

    def _turns(self, turns: list[dict[str, Any]], answer: Any) -> list[dict[str, Any]]:
        if self.source.response is None:
            return turns
        if answer is None or isinstance(answer, str):
            answer = [{"role": "assistant", "content": _response_of(answer)}]
        return [*turns, *as_messages(answer)]

    def _encoded(self, values: Sequence[Any]) -> Sequence[Encoded | Unusable]:
        """Tokens of each value; texts are given to the tokenizer together, which is faster."""
        if self.source.kind == "tokens" or not values:
            return values
        if self.source.turns:
            return [attempt(self._conversation, value) for value in values]
        if self.source.response is None:
            texts = self.tokenizer(list(values))["input_ids"]
            return [Encoded(_closed(opened(ids, self.tokenizer), self.tokenizer)) for ids in texts]
        prompts, responses = map(list, zip(*values, strict=True))
        starts = self.tokenizer(prompts)["input_ids"]
        ends = self.tokenizer(responses, add_special_tokens=False)["input_ids"]
        return [
            Encoded([*start, *_closed(end, self.tokenizer)], len(start))
            for start, end in zip(starts, ends, strict=True)
        ]

    def _conversation(self, value: tuple[list[dict[str, Any]], Any]) -> Encoded:
        ids, scored = scored_chat(value[0], self.tokenizer, self.chat, value[1])
        return Encoded(ids, scored.index(1), {"scored": scored})

    def _pieces(self, found: Encoded, number: int) -> Iterator[dict[str, Any]]:
        """The rows of one example. Texts are in pieces, all else is cut; a row needs a token to train on."""
        ids, size = found.ids, self.max_length
        if len(ids) < 2:
            raise Unusable("fewer than 2 tokens")
        if self._is_text:
            for start in range(0, len(ids), size):
                if len(ids) - start > 1:
                    yield self._row(number, Encoded(ids[start : start + size]))
            return
        if found.prompt_length >= size:
            raise Unusable(
                "a prompt that fills max_length",
                f"the prompt of row {number} has {found.prompt_length} tokens, which leaves no room in "
                f"max_length={size}",
            )
        scored = found.more.get("scored")
        if len(ids) <= found.prompt_length or (
            scored is not None and 1 not in scored[max(found.prompt_length, 1) : size]
        ):
            raise Unusable("no token to train on")
        more = found.more if scored is None else {**found.more, "scored": list(scored)[:size]}
        yield self._row(number, Encoded(ids[:size], found.prompt_length, more), cut=len(ids) > size)

    @property
    def _is_text(self) -> bool:
        """Whether rows are read as texts: they are no tokens or conversations, and have no responses."""
        return self.source.kind in ("text", "prompt") and self.source.response is None and not self.source.turns

    def _row(self, number: int, found: Encoded, **outcome: Any) -> dict[str, Any]:
        rest = {"scored": None, "index": number, **found.more, "source_row": number}
        said = {"cut": False, "left_out": "", "detail": "", **outcome}
        whole = {"input_ids": found.ids, "prompt_length": found.prompt_length, **rest, **said}
        return {name: whole[name] for name in (*self.columns, *OUTCOME)}


def _response_of(answer: Any) -> str:
    text = text_of(answer, "response")
    if not text.strip():
        raise Unusable("an empty response")
    return text


def count(tally: Tally, outcomes: Mapping[str, Sequence[Any]]) -> None:
    """Adds rows' `OUTCOME`, a list a column, to a tally."""
    tally.cut += sum(outcomes["cut"])
    for number, what, detail in zip(*(outcomes[name] for name in ("source_row", "left_out", "detail")), strict=True):
        if what:
            tally.leave_out(number, Unusable(what, detail))
