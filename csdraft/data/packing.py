"""Rows of token ids as batches: several texts in a block, or one text a row, or source and text of an encoder-decoder.

Positions restart at 0 with every text of a block. Given no attention mask and no cache, transformers reads the
boundaries off the positions (`masking_utils.find_packed_sequence_indices`), so that no text sees another; pass
`use_cache=False` to the model. Texts are placed by best-fit decreasing (arXiv 2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from csdraft.data.row_arrays import RowArrays

__all__ = ["IGNORED", "Packed", "Padded", "best_fit", "check_packing", "collate", "collate_seq2seq"]

IGNORED = -100
"""The label of a token that no loss counts."""


class Packed(Dataset):
    """Blocks of texts, all of one length.

    Each item has `input_ids`, `position_ids` and `labels`, all (max_length,) int64: `labels` is the token itself where
    its prediction counts, else `IGNORED`. The first token of a text never counts. Filling comes last in a block, with
    positions of its own and no labels.

    Args:
        rows: `input_ids`, `prompt_length` and, optionally, `scored` each; see `csdraft.data.sources.read_rows`.
        max_length: tokens of a block.
        pad: token id for filling up.
        cache: of what the target computes along these rows; items then have `cached`, (max_length, width), too.

    Raises:
        ValueError: there are no rows, one is longer than a block, or the cache is of other rows.
    """

    def __init__(self, rows: Any, max_length: int, pad: int = 0, cache: RowArrays | None = None):
        lengths = _checked(rows, max_length, cache)
        self.rows, self.max_length, self.pad, self.cache = rows, max_length, pad, cache
        self.blocks = best_fit(lengths, max_length)
        self.tokens = sum(lengths)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        texts = [_example(self.rows[row], row, self.cache) for row in self.blocks[index]]
        whole = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        return _filled(whole, self.max_length, self.pad)


class Padded(Dataset):
    """One text an item, as long as it is; `collate` or `collate_seq2seq` fill up batches.

    Items are as those of `Packed`. Those of an encoder-decoder are `input_ids` (source,) for the encoder, from the
    prompt, and `decoder_input_ids` and `labels` (text,), from what follows it.

    Args:
        rows, max_length, pad, cache: as for `Packed`.
        decoder_start: an encoder-decoder's first token (`config.decoder_start_token_id`); None is decoder-only.

    Raises:
        ValueError: as for `Packed`; or a row of an encoder-decoder has no prompt, or nothing after it.
    """

    def __init__(
        self,
        rows: Any,
        max_length: int,
        pad: int = 0,
        decoder_start: int | None = None,
        cache: RowArrays | None = None,
    ):
        lengths = _checked(rows, max_length, cache)
        if decoder_start is not None and cache is not None:
            raise ValueError("logits are cached for decoder-only models, and decoder_start says encoder-decoder")
        if decoder_start is not None:
            _check_prompts(rows, lengths)
        self.rows, self.pad, self.decoder_start, self.cache = rows, pad, decoder_start, cache
        self.tokens = sum(lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.decoder_start is None:
            return _example(self.rows[index], index, self.cache)
        return _seq2seq(self.rows[index], self.decoder_start)


def _checked(rows: Any, max_length: int, cache: RowArrays | None) -> list[int]:
    """Tokens of each row, which are neither none nor too many."""
    lengths = list(_lengths(rows))
    if not lengths:
        raise ValueError("there are no rows to train on; give a data set that is not empty")
    if max(lengths) > max_length:
        row = lengths.index(max(lengths))
        raise ValueError(f"row {row} has {lengths[row]} tokens, blocks have {max_length}; cut it, or raise max_length")
    if cache is not None:
        cache.check(rows)
    return lengths


def _lengths(rows: Any) -> Iterator[int]:
    if isinstance(rows, list):
        yield from (len(row["input_ids"]) for row in rows)
    else:
        for batch in rows.with_format("numpy", columns=["input_ids"]).iter(1000):
            yield from map(len, batch["input_ids"])


def _check_prompts(rows: Any, lengths: Sequence[int]) -> None:
    """An encoder-decoder reads a prompt and writes what follows it: every row must have both."""
    if isinstance(rows, list):
        prompts = [row.get("prompt_length", 0) for row in rows]
    else:
        prompts = rows["prompt_length"] if "prompt_length" in rows.column_names else [0] * len(lengths)
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
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


def _filled(example: dict[str, Tensor], length: int, pad: int) -> dict[str, Tensor]:
    """The example with a text of `pad` behind it that no loss counts, `length` tokens together."""
    missing = length - len(example["input_ids"])
    if missing <= 0:
        return example
    filling = {
        "input_ids": torch.full((missing,), pad),
        "position_ids": torch.arange(missing),
        "labels": torch.full((missing,), IGNORED),
    }
    if "cached" in example:
        filling["cached"] = torch.zeros(missing, example["cached"].shape[1])
    return {name: torch.cat([example[name], filling[name]]) for name in example}


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which texts share a block: the longest first, each into the fullest block that has room.

    Args:
        lengths: tokens of each text, none above `size`.
        size: of a block.
    """
    blocks: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> blocks that have just that
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
        left = room - lengths[text]
        if left:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(block)
    return blocks


def collate(examples: Sequence[Mapping[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """A batch of items: `input_ids`, `position_ids`, `labels`, (rows, longest) int64; `cached` if items have it.

    There is no attention mask: filling follows the texts and has positions of its own, so no text sees it, whatever
    `pad` is.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    filled = [_filled(dict(example), longest, pad) for example in examples]
    return {name: torch.stack([example[name] for example in filled]) for name in filled[0]}


def collate_seq2seq(examples: Sequence[Mapping[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """A batch of an encoder-decoder's items, filled up on the right.

    Returns:
        `input_ids` and `attention_mask` (rows, source), `decoder_input_ids` and `labels` (rows, text), all int64.
        The decoder needs no mask: what it is filled up with follows its text.
    """
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    seen = [torch.ones_like(source) for source in columns["input_ids"]]
    return {
        "input_ids": pad_sequence(columns["input_ids"], batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence(seen, batch_first=True),
        "decoder_input_ids": pad_sequence(columns["decoder_input_ids"], batch_first=True, padding_value=pad),
        "labels": pad_sequence(columns["labels"], batch_first=True, padding_value=IGNORED),
    }


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raises ValueError if a decoder-only model lets texts of one row see each other (some families' code does).

    Four forwards of four tokens: what follows must not depend on the text before, by the measure of how it would
    depend on it in one text. The model should be in eval mode.
    """

    def change(positions: list[int]) -> float:
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
