"""On-policy batches: the student writes on from the texts' beginnings, and is corrected where it will stand.

GKD (arXiv 2306.13649) and DistillSpec (arXiv 2310.08461) replace a share of the training texts by the student's own.
Which texts are replaced, and by what, depends on the seed, the step and the text: not on how texts are spread over
micro-batches and processes, and not on whether the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.data.packing import IGNORED
from csdraft.drafters.max_gram import MaxGram
from csdraft.trainers.exam import ends_of, left_padded, seed_of, up_to_end

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
    """The batch, about `share` of its texts written anew by the student after their prompts.

    Args:
        batch: `input_ids`, `position_ids` and `labels`, (rows, length); every text starts at position 0.
        share: of the texts; each has its own coin.
        keys: seed and step.
        prompt: tokens kept of a text that has no prompt of its own (or a shorter one).
        temperature: of the student's sampling.
        pad: token id for filling up.

    What follows an end in a new text is not trained on.
    """
    spans = [span for span in texts_of(batch) if _chosen(batch, span, share, keys, prompt)]
    if not spans:
        return batch
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    begun = {span: max(_prompt_length(labels, span), prompt) for span in spans}
    for group in _groups(spans, begun, getattr(student.config, "max_position_embeddings", None)):
        prompts = [ids[row, start : start + begun[row, start, stop]].tolist() for row, start, stop in group]
        inputs = left_padded(prompts, pad, ids.device)
        written = student.generate(
            **inputs,
            assistant=MaxGram(),
            row_seeds=[seed_of(tokens, *keys) for tokens in prompts],
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(stop - start - begun[row, start, stop] for row, start, stop in group),
            pad_token_id=pad,
            use_cache=True,
        )[:, inputs["input_ids"].shape[1] :]
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
    coin = seed_of(batch["input_ids"][row, start:stop].tolist(), *keys, 1) / 2**32
    return scored and stop - start > length and coin < share


def _prompt_length(labels: Tensor, span: Span) -> int:
    """Tokens of a text before the first one that is scored."""
    row, start, stop = span
    scored = (labels[row, start:stop] != IGNORED).nonzero()
    return int(scored[0]) if len(scored) else stop - start
