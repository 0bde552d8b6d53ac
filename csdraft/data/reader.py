"""Turns a source's examples into rows of token ids, one batch at a time, with a reason for each it cannot use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from csdraft.data.chat import ChatFormat, scored_chat
from csdraft.data.messages import as_messages, as_tools, is_broken, kind_of
from csdraft.data.opening import GIVEN, MASKS, SHOWN, TOOLS, Source
from csdraft.data.tally import Unusable

__all__ = ["OUTCOME", "Encoded", "RowReader", "content_of", "ids_end", "text_of", "with_bos"]

OUTCOME = ("source_row", "cut", "left_out", "detail")
"""Columns with the outcome of reading an example; see `RowReader`."""


class Encoded(NamedTuple):
    """An example's tokens, before they are cut."""

    input_ids: list[int]
    prompt_length: int = 0
    scored: list[int] | None = None
    index: int | None = None


# One example's values, checked.


def text_of(value: Any, what: str) -> str:
    """The value if it is a text that a tokenizer can read, else `Unusable`.

    Args:
        what: the text's name in the reason, such as "response".
    """
    if value is None:
        raise Unusable(f"no {what}")
    if not isinstance(value, str):
        raise Unusable(f"{kind_of(value)} as {what}")
    if is_broken(value):
        raise Unusable(f"half a character in its {what}")
    return value


def content_of(example: Mapping[str, Any], number: int, source: Source, tokenizer: Any) -> Any:
    """An example's tokens (`Encoded`), a conversation's messages, or a text; `Unusable` if something is wrong."""
    if source.kind == "tokens":
        return tokens_of(example, number, source, tokenizer)
    value = example.get(source.column)
    if not source.turns:
        return text_of(value, "prompt" if source.kind == "prompt" else "text")
    if value is None:
        raise Unusable("a null conversation")
    return as_messages(value)


def _whole(number: Any) -> Any:
    """If one row has a float or a null, Arrow or pandas turn all rows' numbers into floats."""
    return int(number) if type(number) is float and number.is_integer() else number


def _without_padding(example: Mapping[str, Any]) -> Mapping[str, Any]:
    shown = example.get(SHOWN)
    if not isinstance(shown, list) or all(shown):
        return example
    return {name: [*compress(value, shown)] if isinstance(value, list) else value for name, value in example.items()}


def _scored_by(example: Mapping[str, Any]) -> dict[str, Any]:
    """What the masks of other tools say about a row of tokens; the first of them counts."""
    name = next((name for name in MASKS if isinstance(example.get(name), list)), None)
    if name is None:
        return {}
    scored = [int(mask != (-100 if name == "labels" else 0)) for mask in example[name]]
    return {"scored": scored, "prompt_length": scored.index(1) if 1 in scored else 0}


def tokens_of(example: Mapping[str, Any], number: int, source: Source, tokenizer: Any) -> Encoded:
    """An example that holds token ids.

    Raises:
        ValueError: the ids come from another tokenizer.
    """
    example = _without_padding(example)
    ids = example.get(source.column)
    if ids is None:
        raise Unusable("no tokens")
    if not isinstance(ids, list):
        raise Unusable(f"{kind_of(ids)} in place of tokens")
    ids = [_whole(token) for token in ids]
    if any(type(token) is not int for token in ids):
        raise Unusable("tokens that are not whole numbers")
    if ids and not 0 <= min(ids) <= max(ids) < (end := ids_end(tokenizer)):
        foreign = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"row {number} of {source.name!r} has token {foreign} in {source.column!r}, and the tokenizer's ids end "
            f"before {end}; the data was made with another tokenizer: make it again with this one"
        )
    own = {name: _whole(value) for name in GIVEN if (value := example.get(name)) is not None}
    given = _scored_by(example) | own
    for name in given.keys() & {"prompt_length", "index"}:
        if type(given[name]) is not int or not 0 <= given[name] < 1 << 63:
            raise Unusable(f"{kind_of(given[name])} as {name}", f"{given[name]}: it counts from 0")
    if (scored := given.get("scored")) is not None:
        if not isinstance(scored, list) or any(each not in (0, 1) for each in scored):
            raise Unusable(f"{kind_of(scored)} as scored", "it is a list of 0 and 1")
        if len(scored) != len(ids):
            raise Unusable("a scored list that is not as long as its tokens", f"{len(scored)} for {len(ids)}")
    return Encoded(ids, **given)


def ids_end(tokenizer: Any) -> int:
    """One more than the tokenizer's largest id, which is more than its number of tokens if some ids are free."""
    return _ids_end(tokenizer, len(tokenizer))


@lru_cache(maxsize=1)
def _ids_end(tokenizer: Any, size: int) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def with_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """Adds the begin-of-text token if the tokenizer has one but did not add it itself."""
    start = tokenizer.bos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def _marks_beginnings(tokenizer: Any) -> bool:
    """Whether a tokenizer puts something before every text, as sentencepiece puts a space; true if not known."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return True
    normalizer, splitter = tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer
    text = normalizer.normalize_str("a") if normalizer else "a"
    pieces = splitter.pre_tokenize_str(text) if splitter else [(text, (0, 1))]
    return "".join(piece for piece, _ in pieces) != "a"


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


# Batches of examples.


@dataclass(frozen=True)
class RowReader:
    """Makes rows from a source's examples; `datasets.Dataset.map` calls it with batches and the examples' numbers.

    An example gives one row, a long text several. An example that cannot be used gives a row without tokens whose
    `left_out` and `detail` say why, so that `datasets` caches the counts along with the rows.
    """

    source: Source
    tokenizer: Any
    max_length: int
    chat: ChatFormat
    version: int = 5
    """Raise it whenever rows change: `datasets` reuses the cached rows of readers that compare equal."""

    @property
    def columns(self) -> list[str]:
        """The rows' columns, without `OUTCOME`."""
        scored = self.source.turns or {"scored", *MASKS} & {*self.source.columns}
        index = "index" in self.source.columns
        return ["input_ids", "prompt_length", *(["scored"] if scored else []), *(["index"] if index else [])]

    def __call__(self, batch: Mapping[str, list], numbers: Sequence[int]) -> dict[str, list]:
        columns = [batch[name] for name in self.source.columns]
        examples = [dict(zip(self.source.columns, values, strict=True)) for values in zip(*columns, strict=True)]
        return self.read(examples, numbers)

    def read(self, examples: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> dict[str, list]:
        """The examples' rows, in order, as columns: all of `columns` and `OUTCOME`."""
        rows = list(self._rows(examples, numbers))
        return {name: [row[name] for row in rows] for name in (*self.columns, *OUTCOME)}

    def _rows(self, examples: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        values = list(map(self._checked, examples, numbers))
        encoded = iter(self._encoded([value for value in values if not isinstance(value, Unusable)]))
        for number, value in zip(numbers, values, strict=False):
            try:
                if isinstance(value, Unusable):
                    raise value
                yield from self._pieces(next(encoded), number)
            except Unusable as why:
                yield self._row(number, Encoded([]), left_out=why.what, detail=why.detail)

    def _checked(self, example: Mapping[str, Any], number: int) -> Any:
        """What `_read` returns, or the `Unusable` that it raises."""
        try:
            return self._read(self.source.cleaned(example), number)
        except Unusable as why:
            return why

    def _read(self, example: Mapping[str, Any], number: int) -> Any:
        """An example's tokens; or its text, or prompt and response, if these must still be tokenized."""
        value = content_of(example, number, self.source, self.tokenizer)
        answer = example.get(self.source.response or "")
        if isinstance(value, Encoded):
            return value
        if self.source.turns:
            turns = self._turns(value, answer)
            ids, scored = scored_chat(turns, self.tokenizer, self.chat, as_tools(example.get(TOOLS)))
            return Encoded(ids, scored.index(1), scored)
        if self.source.response is not None:
            return value, _response_of(answer)
        if not value:
            raise Unusable(f"an empty {self.source.kind}")
        return value

    def _turns(self, turns: list[dict[str, Any]], answer: Any) -> list[dict[str, Any]]:
        if self.source.response is None:
            return turns
        if answer is None or isinstance(answer, str):
            answer = [{"role": "assistant", "content": _response_of(answer)}]
        answer = as_messages(answer)
        return answer if answer[: len(turns)] == turns else [*turns, *answer]

    def _encoded(self, values: Sequence[Any]) -> Sequence[Encoded]:
        """The tokens of what `_checked` returned; all texts go to the tokenizer together, which is faster."""
        if self.source.kind == "tokens" or self.source.turns or not values:
            return values
        if self.source.response is None:
            texts = self.tokenizer(list(values))["input_ids"]
            return [Encoded(_with_eos(with_bos(ids, self.tokenizer), self.tokenizer)) for ids in texts]
        prompts, responses = map(list, zip(*values, strict=True))
        starts = self.tokenizer(prompts)["input_ids"]
        ends = self._continued(responses)
        return [
            Encoded([*start, *_with_eos(end, self.tokenizer)], len(start))
            for start, end in zip(starts, ends, strict=True)
        ]

    def _continued(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that follow others, without a space that the tokenizer puts before each alone."""
        alone = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        if not _marks_beginnings(self.tokenizer):
            return alone
        before = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        if "\n" not in self.tokenizer.decode(before):  # as T5's; an encoder-decoder's text begins with its response
            return alone
        after = self.tokenizer(["\n" + text for text in texts], add_special_tokens=False)["input_ids"]
        size = len(before)
        return [longer[size:] if longer[:size] == before else own for longer, own in zip(after, alone, strict=True)]

    def _pieces(self, found: Encoded, number: int) -> Iterator[dict[str, Any]]:
        """One example's rows: texts are split into pieces, all else is cut. A row needs a token to train on."""
        ids, scored, size = found.input_ids, found.scored, self.max_length
        if len(ids) < 2:
            raise Unusable("fewer than 2 tokens")
        if self.source.kind in ("text", "prompt") and self.source.response is None and not self.source.turns:
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
        if len(ids) <= found.prompt_length or (scored and 1 not in scored[max(found.prompt_length, 1) : size]):
            raise Unusable("no token to train on")
        kept = found._replace(input_ids=ids[:size], scored=scored and scored[:size])
        yield self._row(number, kept, cut=len(ids) > size)

    def _row(self, number: int, found: Encoded, **outcome: Any) -> dict[str, Any]:
        index = number if found.index is None else found.index
        said = {"source_row": number, "cut": False, "left_out": "", "detail": "", **outcome}
        whole = {**found._asdict(), "index": index, **said}
        return {name: whole[name] for name in (*self.columns, *OUTCOME)}


def _response_of(answer: Any) -> str:
    text = text_of(answer, "response")
    if not text.strip():
        raise Unusable("an empty response")
    return text
