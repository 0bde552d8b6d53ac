"""On-policy batches: the student writes on from the texts' beginnings, and is corrected where it will stand.

GKD (arXiv 2306.13649) and DistillSpec (arXiv 2310.08461) replace a share of the training texts by the student's own.
Which texts are replaced, and by what, depends on the seed, the step and the text: not on how texts are spread over
micro-batches and processes, and not on whether the run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.data.packing import IGNORED
from csdraft.drafters.max_gram import MaxGram
from csdraft.trainers.evaluation import FRESH, ends_of, left_padded, seed_of, up_to_end

__all__ = ["rewritten"]

Span = tuple[int, int, int]
"""Row of a batch, and start and end of a text in it."""


@torch.no_grad()
def rewritten(
    batch: dict[str, Tensor],
    student: Any,
    share: float,
    keys: Sequence[int],
    prompt: int,
    temperature: float,
    pad: int,
) -> dict[str, Tensor]:
    """The batch, about `share` of its texts written again by the student after their prompts.

    Args:
        batch: `input_ids`, `position_ids` and `labels`, (rows, length); every text starts at position 0. Or an
            encoder-decoder's, see `csdraft.data.packing.collate_seq2seq`.
        share: of the texts; each has its own coin.
        keys: seed and step.
        prompt: tokens kept of a text that has no prompt of its own (or a shorter one); an encoder-decoder's prompt is
            what its encoder reads, and all that follows is written again.
        temperature: of the student's sampling.
        pad: token id for filling up.

    What follows an end in a new text is not trained on. No text becomes longer.
    """
    if "decoder_input_ids" in batch:
        return _answered(batch, student, share, keys, temperature, pad)
    spans = [span for span in texts_of(batch) if _chosen(batch, span, share, keys, prompt)]
    if not spans:
        return batch
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    begun = {span: max(_prompt_length(labels, span), prompt) for span in spans}
    for group in _groups(spans, begun, getattr(student.config, "max_position_embeddings", None)):
        prompts = [ids[row, start : start + begun[row, start, stop]].tolist() for row, start, stop in group]
        inputs = left_padded(prompts, pad, ids.device)
        seeds = [seed_of(tokens, *keys) for tokens in prompts]
        longest = max(stop - start - begun[row, start, stop] for row, start, stop in group)
        written = _written(student, inputs, seeds, longest, temperature, pad)[:, inputs["input_ids"].shape[1] :]
        for (row, start, stop), tokens in zip(group, written, strict=True):
            first = start + begun[row, start, stop]
            tokens = nn.functional.pad(tokens, (0, max(stop - first - len(tokens), 0)), value=pad)[: stop - first]
            missing = stop - first - len(written[0])  # all texts of the group may have ended early
            new = up_to_end(tokens, ends_of(student))
            if missing > 0:
                new[-missing:] = False
            ids[row, first:stop] = tokens
            labels[row, start:first] = IGNORED
            labels[row, first:stop] = tokens.masked_fill(~new, IGNORED)
    return batch | {"input_ids": ids, "labels": labels}


def _written(
    student: Any, inputs: dict[str, Tensor], seeds: Sequence[int], longest: int, temperature: float, pad: int
) -> Tensor:
    """What the student's `generate` returns; each row's text depends on its seed alone."""
    return student.generate(
        **inputs,
        assistant=MaxGram(),
        row_seeds=seeds,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        pad_token_id=pad,
        use_cache=True,
        **FRESH,
    )


def _answered(
    batch: dict[str, Tensor], student: Any, share: float, keys: Sequence[int], temperature: float, pad: int
) -> dict[str, Tensor]:
    """An encoder-decoder's batch, about `share` of its texts written again."""
    scored = batch["labels"] != IGNORED
    places = torch.arange(1, scored.shape[1] + 1, device=scored.device)
    lengths = (scored * places).amax(1)
    whole = [  # source and text, without what fills them up
        source[seen.bool()].tolist() + labels[counts].tolist()
        for source, seen, labels, counts in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], scored, strict=True
        )
    ]
    rows = [row for row, text in enumerate(whole) if lengths[row] and _coin(text, keys) < share]
    if not rows:
        return batch
    inputs = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
    seeds = [seed_of(whole[row], *keys) for row in rows]
    written = _written(student, inputs, seeds, int(lengths[rows].max()), temperature, pad)[:, 1:]
    tokens = nn.functional.pad(written, (0, len(places) - written.shape[1]), value=pad)
    counts = up_to_end(tokens, ends_of(student)) & (places <= lengths[rows][:, None]) & (places <= written.shape[1])
    labels, read = batch["labels"].clone(), batch["decoder_input_ids"].clone()
    labels[rows] = tokens.masked_fill(~counts, IGNORED)
    read[rows, 1:] = tokens[:, :-1]
    return batch | {"labels": labels, "decoder_input_ids": read}


def _groups(spans: list[Span], begun: dict[Span, int], context: int | None) -> list[list[Span]]:
    """Texts that are decoded together: the longest prompt and the longest continuation must fit the context."""
    longest = max(begun[span] for span in spans) + max(span[2] - span[1] - begun[span] for span in spans)
    if context is None or longest <= context or len(spans) == 1:
        return [spans]
    ordered = sorted(spans, key=lambda span: begun[span])
    half = len(ordered) // 2
    return _groups(ordered[:half], begun, context) + _groups(ordered[half:], begun, context)


def texts_of(batch: dict[str, Tensor]) -> list[Span]:
    """The texts packed into the rows of a batch: they start where positions do."""
    spans = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0]
        spans += [(row, *ends) for ends in zip(starts, [*starts[1:], len(positions)], strict=True)]
    return spans


def _chosen(batch: dict[str, Tensor], span: Span, share: float, keys: Sequence[int], prompt: int) -> bool:
    row, start, stop = span
    length = max(_prompt_length(batch["labels"], span), prompt)
    scored = bool((batch["labels"][row, start:stop] != IGNORED).any())
    coin = _coin(batch["input_ids"][row, start:stop].tolist(), keys)
    return scored and stop - start > length and coin < share


def _coin(tokens: list[int], keys: Sequence[int]) -> float:
    """From 0 to 1, another number for each text and step: with a checksum the same texts would stay together."""
    digest = hashlib.blake2b(repr((tokens, list(keys))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _prompt_length(labels: Tensor, span: Span) -> int:
    """Tokens of a text before the first one that is scored."""
    row, start, stop = span
    scored = (labels[row, start:stop] != IGNORED).nonzero()
    return int(scored[0]) if len(scored) else stop - start
