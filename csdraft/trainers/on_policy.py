"""On-policy batches: the student continues the beginnings of texts, and learns on what it wrote itself.

GKD (arXiv 2306.13649) and DistillSpec (arXiv 2310.08461) replace a share of the training texts by the student's own.
Which texts are replaced, and by what, depends on the seed, the step and the text only: not on how texts are spread
over micro-batches and processes, and not on whether the run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csdraft.data.packing import IGNORED, ends_of, padded_prompts
from csdraft.drafters.max_gram import MaxGram
from csdraft.trainers.evaluation import FRESH, seed_of, up_to_end

__all__ = ["OnPolicy"]

Span = tuple[int, int, int]
"""A text in a batch: its row, its start and its end."""


@dataclass(frozen=True)
class OnPolicy:
    """Lets the student rewrite texts.

    Args:
        share: of the texts; each is chosen independently.
        prompt: tokens kept at least of each text. Of an encoder-decoder, nothing after the encoder's text is kept.
        temperature: of the student's sampling.
        pad: padding token id.
        vocab: tokens of the target; a student with a wider vocabulary does not write the others.
    """

    share: float
    prompt: int
    temperature: float
    pad: int
    vocab: int

    @torch.no_grad()
    def rewritten(self, batch: dict[str, Tensor], student: Any, keys: Sequence[int]) -> dict[str, Tensor]:
        """The batch, with about `share` of its texts rewritten by the student after their prompts.

        A new text is trained on up to its first end token. No text becomes longer.

        Args:
            batch: `input_ids`, `position_ids` and `labels`, (rows, length); every text starts at position 0. Or an
                encoder-decoder's batch, see `csdraft.data.packing.collate_seq2seq`.
            keys: seed and step.
        """
        if "decoder_input_ids" in batch:
            return self._rewritten_answers(batch, student, keys)
        spans = [span for span in texts_of(batch) if _chosen(batch, span, self.share, keys, self.prompt)]
        if not spans:
            return batch
        ids, labels = batch["input_ids"].clone(), batch["labels"].clone()  # (rows, length)
        kept = {span: max(_prompt_length(labels, span), self.prompt) for span in spans}
        for group in _groups(spans, kept, getattr(student.config, "max_position_embeddings", None)):
            prompts = [ids[row, start : start + kept[row, start, stop]].tolist() for row, start, stop in group]
            inputs = padded_prompts(prompts, self.pad, ids.device)
            seeds = [seed_of(tokens, *keys) for tokens in prompts]
            longest = max(stop - start - kept[row, start, stop] for row, start, stop in group)
            written = self._written(student, inputs, seeds, longest)[:, inputs["input_ids"].shape[1] :]
            for (row, start, stop), text in zip(group, written, strict=True):
                first = start + kept[row, start, stop]
                text = text[: stop - first]  # shorter if all texts of the group ended early
                ids[row, first:stop], labels[row, start:stop] = self.pad, IGNORED
                ids[row, first : first + len(text)] = text
                labels[row, first : first + len(text)] = _labels(text, student)
        return batch | {"input_ids": ids, "labels": labels}

    def _rewritten_answers(self, batch: dict[str, Tensor], student: Any, keys: Sequence[int]) -> dict[str, Tensor]:
        """An encoder-decoder's batch, about `share` of its texts rewritten."""
        labels, read = batch["labels"].clone(), batch["decoder_input_ids"].clone()  # (rows, length)
        scored = labels != IGNORED
        lengths = (scored * torch.arange(1, scored.shape[1] + 1, device=scored.device)).amax(1).tolist()
        whole = [  # source and text, without padding
            batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() + labels[row][scored[row]].tolist()
            for row in range(len(labels))
        ]
        rows = [row for row, text in enumerate(whole) if lengths[row] and _coin(text, keys) < self.share]
        if not rows:
            return batch
        inputs = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
        seeds = [seed_of(whole[row], *keys) for row in rows]
        written = self._written(student, inputs, seeds, max(lengths[row] for row in rows))[:, 1:]
        for row, text in zip(rows, written, strict=True):
            text = text[: lengths[row]]
            labels[row], read[row, 1:] = IGNORED, self.pad
            labels[row, : len(text)] = _labels(text, student)
            read[row, 1 : len(text)] = text[:-1]
        return batch | {"labels": labels, "decoder_input_ids": read}

    def _written(self, student: Any, inputs: Any, seeds: Sequence[int], longest: int) -> Tensor:
        """What the student's `generate` returns; each row's text depends on its seed alone."""
        foreign = range(self.vocab, student.config.get_text_config(decoder=True).vocab_size)
        return student.generate(
            **inputs,
            assistant=MaxGram(),
            row_seeds=seeds,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=longest,
            pad_token_id=self.pad,
            suppress_tokens=[*foreign] or None,
            use_cache=True,
            **FRESH,
        )


def _labels(text: Tensor, student: Any) -> Tensor:
    """(length,) the tokens of a new text up to its first end, then `IGNORED`."""
    return text.masked_fill(~up_to_end(text, ends_of(student.generation_config)), IGNORED)


def _groups(spans: list[Span], kept: dict[Span, int], context: int | None) -> list[list[Span]]:
    """Texts to decode together: the longest prompt and the longest continuation must fit into the context."""
    longest = max(kept[span] for span in spans) + max(span[2] - span[1] - kept[span] for span in spans)
    if context is None or longest <= context or len(spans) == 1:
        return [spans]
    ordered = sorted(spans, key=lambda span: kept[span])
    half = len(ordered) // 2
    return _groups(ordered[:half], kept, context) + _groups(ordered[half:], kept, context)


def texts_of(batch: dict[str, Tensor]) -> list[Span]:
    """The texts packed into the rows of a batch. Each starts where positions start again."""
    spans = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0]
        spans += [(row, *ends) for ends in zip(starts, [*starts[1:], len(positions)], strict=True)]
    return spans


def _chosen(batch: dict[str, Tensor], span: Span, share: float, keys: Sequence[int], prompt: int) -> bool:
    """Whether a text is rewritten: by chance, and if it has labels and is longer than its prompt."""
    row, start, stop = span
    length = _prompt_length(batch["labels"], span)
    coin = _coin(batch["input_ids"][row, start:stop].tolist(), keys)
    return coin < share and stop - start > max(length, prompt)


def _coin(tokens: list[int], keys: Sequence[int]) -> float:
    """A pseudo-random number from 0 to 1 for each text and step. (A checksum would choose the same texts together.)"""
    digest = hashlib.blake2b(repr((tokens, list(keys))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _prompt_length(labels: Tensor, span: Span) -> int:
    """Tokens of a text before its first label; all of them if it has none."""
    row, start, stop = span
    scored = (labels[row, start:stop] != IGNORED).nonzero()
    return int(scored[0]) if len(scored) else stop - start
