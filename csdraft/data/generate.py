"""A corpus in the target's own hand: what it writes after real beginnings, to align a drafter with it.

Sequence-level distillation (Kim and Rush, arXiv 1606.07947; DistillSpec, arXiv 2310.08461, finds target-written text
the safest data for drafters): a drafter trained on this agrees more often with the target than one trained on the text
that the target was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from csdraft.data.text import END, Document

__all__ = ["beginnings", "write_corpus"]


def beginnings(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, seed: int = 0
) -> Iterator[list[int]]:
    """Endless pieces of `length` tokens from anywhere in the documents; the same for the same seed."""
    ids = [document for document in tokenizer([d.text for d in documents])["input_ids"] if len(document) > length]
    if not ids:
        raise ValueError(f"no document has more than {length} tokens; ask for shorter beginnings")
    chosen = random.Random(seed)
    while True:
        document = chosen.choices(ids, [len(tokens) for tokens in ids])[0]
        start = chosen.randrange(len(document) - length)
        yield document[start : start + length]


@torch.no_grad()
def write_corpus(
    target: Any,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    out: Path,
    count: int,
    assistant: Any = None,
    begin: int = 128,
    new_tokens: int = 128,
    rows: int = 8,
    sampled: float = 0.25,
    temperature: float = 0.8,
) -> Iterator[int]:
    """Appends texts to `out` until it holds `count`, and yields how many it holds; goes on where a killed run stopped.

    Args:
        target: writes; greedily, or for the share `sampled` of the batches at `temperature`.
        documents: where the beginnings come from.
        out: a .txt file of texts parted by `<|endoftext|>`, beginnings included.
        count: texts wanted.
        assistant: a csdraft drafter; it changes how fast the texts come, not what they say.
        begin, new_tokens: tokens of each beginning and of what follows.
        rows: texts written at once.
    """
    done = out.read_text(encoding="utf-8").count(END) // rows * rows if out.exists() else 0
    starts = beginnings(documents, tokenizer, begin)
    for _ in range(done):
        next(starts)
    for first in range(done, count, rows):
        ids = torch.tensor([next(starts) for _ in range(rows)], device=target.device)
        sample = (first // rows) % 100 < 100 * sampled
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if sample else {"do_sample": False}
        texts = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            assistant=assistant,
            **({} if assistant is None else {"row_seeds": range(first, first + rows)}),
            pad_token_id=tokenizer.pad_token_id,
            **how,
        )
        with out.open("a", encoding="utf-8") as file:
            for text in tokenizer.batch_decode(texts, skip_special_tokens=True):
                file.write(f"{text}\n{END}\n")
        yield first + rows
