"""Rows of token ids as batches: several texts in a block, or one text a row, or source and text of an encoder-decoder.

Positions restart at 0 with every text of a block. Given no attention mask and no cache, transformers reads the
boundaries off the positions (`masking_utils.find_packed_sequence_indices`), so that no text sees another; pass
`use_cache=False` to the model. Texts are placed by best-fit decreasing (arXiv 2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["IGNORED", "Packed", "SourceCollator", "best_fit", "collate"]

IGNORED = -100
"""The label of a token that nobody is trained to predict."""


class Packed(Dataset):
    """Blocks of texts.

    Each item has `input_ids`, `position_ids` and `labels`, all (length,) int64: `labels` is the token itself where its
    prediction counts, else `IGNORED`. The first token of a text never counts.

    Args:
        rows: `input_ids`, `prompt_length` and, optionally, `scored` each; see `csdraft.data.sources.read_rows`.
        max_length: tokens of a block; every block is filled up to it.
        pad: token id for filling up. The filling has positions of its own and no labels.
        packing: False for one text an item, not filled up: `collate` does it for the batch.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] | Any, max_length: int, pad: int = 0, packing: bool = True):
        lengths = list(_lengths(rows))
        if not lengths:
            raise ValueError("there are no rows to train on; give a data set that is not empty")
        if max(lengths) > max_length:
            row = lengths.index(max(lengths))
            raise ValueError(
                f"row {row} has {lengths[row]} tokens, blocks have {max_length}; cut it, or raise max_length"
            )
        self.rows = rows
        self.pad = pad
        self.max_length = max_length if packing else None
        self.blocks = best_fit(lengths, max_length) if packing else [[row] for row in range(len(lengths))]
        self.tokens = sum(lengths)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        texts = [_example(self.rows[row]) for row in self.blocks[index]]
        whole = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        return _filled(whole, self.max_length or 0, self.pad)


def _lengths(rows: Any) -> Iterator[int]:
    if isinstance(rows, list):
        yield from (len(row["input_ids"]) for row in rows)
    else:
        for batch in rows.with_format("numpy", columns=["input_ids"]).iter(1000):
            yield from map(len, batch["input_ids"])


def _example(row: Mapping[str, Any]) -> dict[str, Tensor]:
    ids = torch.tensor(row["input_ids"], dtype=torch.long)
    labels = ids.clone()
    labels[: max(row.get("prompt_length", 0), 1)] = IGNORED
    if row.get("scored") is not None:
        labels[torch.tensor(row["scored"]) == 0] = IGNORED
    return {"input_ids": ids, "position_ids": torch.arange(len(ids)), "labels": labels}


def _filled(example: dict[str, Tensor], length: int, pad: int) -> dict[str, Tensor]:
    """The example with a text of `pad` behind it that nobody is trained on, `length` tokens together."""
    missing = length - len(example["input_ids"])
    if missing <= 0:
        return example
    filling = {
        "input_ids": torch.full((missing,), pad),
        "position_ids": torch.arange(missing),
        "labels": torch.full((missing,), IGNORED),
    }
    return {name: torch.cat([example[name], filling[name]]) for name in filling}


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
    """A batch of `Packed`'s items: `input_ids`, `position_ids`, `labels`, (rows, longest) int64.

    There is no attention mask: filling follows the texts and has positions of its own, so no text sees it.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    filled = [_filled(dict(example), longest, pad) for example in examples]
    return {name: torch.stack([example[name] for example in filled]) for name in filled[0]}


@dataclass(frozen=True)
class SourceCollator:
    """Batches for encoder-decoders, from rows themselves: the prompt is the encoder's, the rest the decoder's.

    Args:
        pad: token id for filling up, on the right.
        start: the decoder's first token (`config.decoder_start_token_id`).
    """

    pad: int
    start: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (rows, source); `decoder_input_ids`, `labels` (rows, target), all int64."""
        sources, texts, labels = [], [], []
        for row in rows:
            ids, prompt = list(row["input_ids"]), row.get("prompt_length", 0)
            if not 0 < prompt < len(ids):
                raise ValueError(
                    f"row {row.get('index')} has a prompt of {prompt} tokens and {len(ids) - prompt} after it; an "
                    "encoder-decoder needs both: give rows of 'prompt' and 'response'"
                )
            scored = row.get("scored") or [1] * len(ids)
            sources.append(ids[:prompt])
            texts.append([self.start, *ids[prompt:-1]])
            labels.append([t if s else IGNORED for t, s in zip(ids[prompt:], scored[prompt:], strict=True)])
        return {
            "input_ids": _right_padded(sources, self.pad),
            "attention_mask": _right_padded([[1] * len(source) for source in sources], 0),
            "decoder_input_ids": _right_padded(texts, self.pad),
            "labels": _right_padded(labels, IGNORED),
        }


def _right_padded(texts: Sequence[Sequence[int]], pad: int) -> Tensor:
    width = max(map(len, texts))
    return torch.tensor([[*text, *[pad] * (width - len(text))] for text in texts])
