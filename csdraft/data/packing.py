"""Batches of rows of token ids, and the order in which training reads them.

A batch is several texts in a block, one text per row, or an encoder-decoder's sources and texts.

Positions restart at 0 with every text in a block. Without an attention mask and a cache, transformers finds the
boundaries from the positions (`masking_utils.find_packed_sequence_indices`), so no text sees another; pass
`use_cache=False` to the model. Texts are placed by best-fit decreasing (arXiv 2404.10830).
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padded
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from csdraft.data.row_arrays import RowArrays, lengths_of, prompt_lengths_of

__all__ = [
    "IGNORED", "Filled", "Shuffled", "Texts", "best_fit", "check_packing", "collate", "collate_seq2seq", "ends_of",
    "pad_of", "padded_prompts",
]  # fmt: skip

IGNORED = -100
"""The label of a token that does not count for the loss."""


class Texts(Dataset):
    """Rows of token ids as items: blocks of several texts, or one text each.

    An item has `input_ids`, `position_ids` and `labels`, all (length,) int64. A label is the token itself if its
    prediction counts, else `IGNORED`; a text's first token never counts. A block has `max_length` tokens; its padding
    comes last and has positions of its own and no labels. An encoder-decoder's items are `input_ids` (source,) for the
    encoder, from the prompt, and `decoder_input_ids` and `labels` (text,), from what follows it.

    Args:
        rows: each with `input_ids`, `prompt_length` and, optionally, `scored`; see `csdraft.data.sources.read_rows`.
        max_length: the most tokens of a row, and the tokens of a block.
        pad: token id for padding.
        packing: whether items are blocks.
        decoder_start: an encoder-decoder's first token (`config.decoder_start_token_id`), which is not packed; None if
            decoder-only.
        cache: what the target computed along these rows; items then have `cached`, (length, width), too.

    Raises:
        ValueError: there are no rows, one is longer than `max_length`, or the cache belongs to other rows; or an
            encoder-decoder's row has no prompt, or nothing after it.
    """

    def __init__(
        self,
        rows: Any,
        max_length: int,
        pad: int = 0,
        packing: bool = True,
        decoder_start: int | None = None,
        cache: RowArrays | None = None,
    ):
        lengths = lengths_of(rows).tolist()
        if not lengths:
            raise ValueError("there are no rows to train on; give a data set that is not empty")
        if (longest := max(lengths)) > max_length:
            row = lengths.index(longest)
            raise ValueError(f"row {row} has {longest} tokens, blocks have {max_length}; cut it, or raise max_length")
        if cache is not None:
            cache.check(rows)
        if decoder_start is not None:
            _check_prompts(rows, lengths)
        self.packed = packing and decoder_start is None
        self.rows, self.pad, self.decoder_start, self.cache = rows, pad, decoder_start, cache
        self.blocks = best_fit(lengths, max_length) if self.packed else [[row] for row in range(len(rows))]
        self.least, self.tokens = max_length if self.packed else 0, sum(lengths)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.decoder_start is not None:
            return _seq2seq(self.rows[index], self.decoder_start)
        texts = [_example(self.rows[row], row, self.cache) for row in self.blocks[index]]
        whole = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        return _filled(whole, max(self.least, len(whole["input_ids"])), self.pad)

    @property
    def collator(self) -> Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]:
        """Makes a batch of items."""
        return partial(collate if self.decoder_start is None else collate_seq2seq, pad=self.pad)


def _check_prompts(rows: Any, lengths: Sequence[int]) -> None:
    """An encoder-decoder reads a prompt and writes what follows it, so every row must have both."""
    for index, (prompt, length) in enumerate(zip(prompt_lengths_of(rows).tolist(), lengths, strict=True)):
        if not 0 < prompt < length:
            raise ValueError(
                f"row {index} has a prompt of {prompt} tokens and {length - prompt} after it; an encoder-decoder "
                "needs both: give rows of 'prompt' and 'response'"
            )


def _labels(row: Mapping[str, Any], ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[: max(row.get("prompt_length") or 0, 1)] = IGNORED
    if row.get("scored") is not None:
        labels[torch.tensor(row["scored"]) == 0] = IGNORED
    return labels


def _example(row: Mapping[str, Any], index: int, cache: RowArrays | None) -> dict[str, Tensor]:
    ids = torch.tensor(row["input_ids"], dtype=torch.long)
    cached = {} if cache is None else {"cached": cache.packed(index)}
    return {"input_ids": ids, "position_ids": torch.arange(len(ids)), "labels": _labels(row, ids), **cached}


def _seq2seq(row: Mapping[str, Any], start: int) -> dict[str, Tensor]:
    ids, prompt = torch.tensor(row["input_ids"], dtype=torch.long), row.get("prompt_length", 0)
    return {
        "input_ids": ids[:prompt],
        "decoder_input_ids": torch.cat([torch.tensor([start]), ids[prompt:-1]]),
        "labels": _labels(row, ids)[prompt:],
    }


def _filled(example: Mapping[str, Tensor], length: int, pad: int) -> dict[str, Tensor]:
    """The example padded on the right to `length` tokens, where the padding has its own positions and no labels."""
    missing = length - len(example["input_ids"])
    filled = {
        "input_ids": padded(example["input_ids"], (0, missing), value=pad),
        "position_ids": torch.cat([example["position_ids"], torch.arange(missing)]),
        "labels": padded(example["labels"], (0, missing), value=IGNORED),
    }
    if "cached" in example:
        filled["cached"] = padded(example["cached"], (0, 0, 0, missing))  # (length, width)
    return filled


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which texts share a block of `size` tokens: the longest first, each in the fullest block that has room."""
    blocks: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> blocks with exactly that room
    rooms: list[int] = []  # the keys, sorted
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        at = bisect_left(rooms, lengths[text])
        if at < len(rooms):
            room = rooms[at]
            block = with_room[room].pop()
            if not with_room[room]:
                del rooms[at], with_room[room]
        else:
            room, block = size, len(blocks)
            blocks.append([])
        blocks[block].append(text)
        if left := room - lengths[text]:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(block)
    return blocks


def collate(examples: Sequence[Mapping[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """A batch of items: `input_ids`, `position_ids`, `labels`, (rows, longest) int64; `cached` if items have it.

    There is no attention mask: padding follows the texts and has positions of its own, so no text sees it, whatever
    `pad` is.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    filled = [_filled(example, longest, pad) for example in examples]
    return {name: torch.stack([example[name] for example in filled]) for name in filled[0]}


def collate_seq2seq(examples: Sequence[Mapping[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """A batch of an encoder-decoder's items, padded on the right.

    Returns:
        `input_ids` and `attention_mask` (rows, source), `decoder_input_ids` and `labels` (rows, text), all int64.
        The decoder needs no mask, because its padding follows its text.
    """
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    read, labels = (
        pad_sequence(columns[name], batch_first=True, padding_value=fill)
        for name, fill in (("decoder_input_ids", pad), ("labels", IGNORED))
    )
    return padded_prompts(columns["input_ids"], pad, side="right") | {"decoder_input_ids": read, "labels": labels}


def padded_prompts(texts: Sequence[Any], pad: int, device: Any = None, side: str = "left") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of token ids, (rows, longest) int64."""
    rows = [torch.as_tensor(text, dtype=torch.long) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def ends_of(config: Any) -> list[int]:
    """The end tokens in a config or a generation config."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class Shuffled(Sampler):
    """All indices of a data set, in a new order every epoch, and then indices past its end; see `Filled`.

    The trainer itself sets the epoch (`set_epoch`). accelerate (1.15) cannot: with several processes, its loader that
    skips the batches a resumed run has read hides the sampler.

    Args:
        multiple: rows that the processes read together. The order is filled up to a multiple of it; otherwise
            accelerate would fill it up with rows that have been read already.
    """

    def __init__(self, size: int, seed: int, multiple: int = 1):
        self.size, self.seed, self.epoch = size, seed, 0
        self.missing = -size % multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size + self.missing

    def __iter__(self) -> Iterator[int]:
        """The order of this epoch."""
        yield from random.Random(f"{self.seed} {self.epoch}").sample(range(self.size), self.size)
        yield from range(self.size, len(self))

    def batch(self, number: int, rows: int) -> list[int]:
        """The items of the data set in one batch of this epoch, counted over all processes, which take turns."""
        return [index for index in islice(self, number * rows, (number + 1) * rows) if index < self.size]


class Filled(Dataset):
    """A data set of items with `labels`, and any number of extra items that have no labels to learn."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.data):
            return self.data[index]
        item = self.data[0]
        return item | {"labels": torch.full_like(item["labels"], IGNORED)}


def pad_of(tokenizer: Any, config: Any) -> int:
    """The padding token, or else the end token, if the model with this config has it; 0 otherwise.

    A tokenizer may have been given a padding token that its model's vocabulary lacks.
    """
    tokens = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    vocab = config.get_text_config(decoder=True).vocab_size
    return next((token for token in tokens if token is not None and token < vocab), 0)


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raises ValueError if a decoder-only model lets texts in one row see each other (some families' code does).

    Runs four forwards of four tokens. Changing the first text must change the second text's logits far less than
    it would if both were one text. The model should be in eval mode.
    """

    def change(positions: list[int]) -> float:
        """How much the last two logits change with the first two tokens."""
        after = [
            model(
                input_ids=torch.tensor([[*first, 2, 3]], device=model.device),
                position_ids=torch.tensor([positions], device=model.device),
                use_cache=False,
            ).logits[0, 2:]
            for first in ((0, 1), (4, 5))
        ]
        return (after[0] - after[1]).float().abs().max().item()

    if change([0, 1, 0, 1]) > 0.1 * change([0, 1, 2, 3]):
        raise ValueError(
            f"{type(model).__name__} does not keep texts apart that are packed into one row; set packing=false"
        )
