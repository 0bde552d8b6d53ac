"""Logits processors: `generate`'s list, applied to one position or to many at once.

In plain `generate` a processor sees one position of every row. A review has many positions, each after a different
text. Most processors never read the text, and two kinds need to know little about it: its length, or which tokens it
has. These can process all positions of a batch together, on the model's device; they get what they need as `Before`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from csdraft.decoding.awaited import Awaited
from csdraft.decoding.interfaces import Request
from csdraft.decoding.text import Text

__all__ = ["Before", "Processing"]

TEXT_BLIND = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
)
"""Processors that never read the text: they can process many positions at once."""

STATELESS = (
    hf.RepetitionPenaltyLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.PrefixConstrainedLogitsProcessor,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
)
"""Processors that read the text but keep no state: a drafter may call them any number of times."""

BATCH_INDEXED = (
    hf.RepetitionPenaltyLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
)
"""Processors that need to know which row of the batch they process."""

BY_LENGTH = (hf.MinLengthLogitsProcessor, hf.MinNewTokensLengthLogitsProcessor)
"""Processors that only need to know how long the text is."""


@dataclass(frozen=True, eq=False)
class Before:
    """What precedes each of n positions.

    Attributes:
        lengths: (n,) tokens before it, with the padding.
        seen: (n, vocab) bool: which tokens those are, the padding token too; None if no processor needs it.
    """

    lengths: Sequence[int]
    seen: Tensor | None = None


class Processing:
    """The logits processors of one level: the whole list, in order, for every row of a batch.

    Args:
        processors: the list that `generate` prepared, with warpers.
        rows: batch size.

    Attributes:
        text_blind: whether none of them reads the text.
        reads_tokens: whether one of them needs `Before.seen`.
        skipped: (rows,) if so, how many leading tokens of each row, padding included, do not count as seen. If it has
            another length, no penalty that reads tokens can process many positions at once.
        at_once: whether all of them can process many positions at once.
        stateful: those that keep state, or whose code is not known.
        temperature: the product of all temperatures.
    """

    def __init__(self, processors: Sequence, rows: int):
        self.rows = rows
        self.processors = list(processors)
        self.text_blind = all(type(p) in TEXT_BLIND for p in self.processors)
        skips = [_skipped(p, rows) for p in self.processors if type(p) is hf.RepetitionPenaltyLogitsProcessor]
        self.reads_tokens, self.skipped = bool(skips), skips[0] if skips else []
        known = all(type(p) in (*TEXT_BLIND, *BY_LENGTH, hf.RepetitionPenaltyLogitsProcessor) for p in self.processors)
        self.at_once = known and all(skip == skips[0] and len(skip) == rows for skip in skips)
        self.stateful = [p for p in self.processors if type(p) not in TEXT_BLIND + STATELESS]
        self.temperature = math.prod(p.temperature for p in self.processors if type(p) is hf.TemperatureLogitsWarper)
        self._ends: dict[int, Tensor] = {}  # by the id of a processor: (vocab,) bool, the tokens that it suppresses

    def for_drafters(self) -> Processing:
        """The processors that drafters may apply: the text-blind and the stateless ones of transformers."""
        return Processing([p for p in self.processors if type(p) in TEXT_BLIND + STATELESS], self.rows)

    def before(self, requests: Sequence[Request], logits: Tensor) -> Before | None:
        """What `all_at_once` needs to know, for (n, vocab) logits after the n nodes of some requests."""
        if self.text_blind:
            return None
        lengths = [len(r.text) + r.text.padding + r.draft.depth(node) for r in requests for node in r.after]
        if not self.reads_tokens:
            return Before(lengths)
        return Before(lengths, torch.cat([self.seen(request, logits) for request in requests]))

    def ignores_new(self, row: int, text: Text) -> bool:
        """Whether the next token of a row will not count as seen: the row is shorter than what a penalty skips."""
        return self.reads_tokens and self.skipped[row] > len(text) + text.padding

    def seen(self, request: Request, logits: Tensor) -> Tensor:
        """(nodes, vocab) bool: `Before.seen` of one request, as wide as (..., vocab) logits and on their device.

        Drafted tokens that are still on the device stay there.
        """
        text, draft, vocab, device = request.text, request.draft, logits.shape[-1], logits.device
        drafted, skipped, host = draft.tokens, self.skipped[request.row], {"dtype": torch.long, "device": "cpu"}
        known = drafted.on_device if isinstance(drafted, Awaited) else torch.tensor(drafted, **host)
        known = known.to(device, non_blocking=True).clamp(max=vocab)
        known = torch.nn.functional.pad(known, (0, 1), value=vocab)  # (drafted + 1,)
        short = max(skipped - len(text) - text.padding, 0)  # drafted tokens that do not count either
        paths = [draft.path(node)[short:] for node in request.after]
        deepest = max(map(len, paths))
        index = torch.tensor([[*path, *[len(drafted)] * (deepest - len(path))] for path in paths], **host)
        table = torch.zeros(vocab + 1, dtype=torch.bool, device=device)  # the last entry is for ids beyond `vocab`
        table.scatter_(0, text.padded()[0, skipped:].to(device).clamp(max=vocab), True)
        table = table.repeat(len(paths), 1)  # (nodes, vocab + 1)
        return table.scatter_(1, known[index.to(device, non_blocking=True)], True)[:, :-1]

    def all_at_once(self, logits: Tensor, before: Before | None = None) -> Tensor:
        """(n, vocab) processed scores of (n, vocab) raw logits of any rows and positions; only if `at_once`.

        Args:
            before: what precedes each position; needed unless `text_blind`.
        """
        if not self.processors:
            return logits
        scores = logits.float()
        if scores is logits:
            scores = logits.clone()
        ids = torch.empty(scores.shape[0], 0, dtype=torch.long, device=scores.device)  # (n, 0) no text
        for processor in self.processors:
            if type(processor) in TEXT_BLIND:
                scores = processor(ids, scores)
            elif type(processor) in BY_LENGTH:
                scores = self._without_ends(processor, scores, before.lengths)  # type: ignore[union-attr]
            else:  # a repetition penalty, computed as in transformers
                penalized = torch.where(scores < 0, scores * processor.penalty, scores / processor.penalty)
                scores = torch.where(before.seen, penalized, scores)  # type: ignore[union-attr,arg-type]
        return scores

    def _without_ends(self, processor: hf.LogitsProcessor, scores: Tensor, lengths: Sequence[int]) -> Tensor:
        """The (n, vocab) scores, with -inf for tokens that end the text at positions where it may not end yet."""
        short = [length < _least(processor) for length in lengths]
        if not any(short):
            return scores
        ends = self._ends.get(id(processor))  # (vocab,) bool
        if ends is None or ends.device != scores.device or len(ends) != scores.shape[-1]:
            vocabulary = torch.arange(scores.shape[-1], device=scores.device)
            ends = self._ends[id(processor)] = torch.isin(vocabulary, processor.eos_token_id.to(scores.device))  # type: ignore[attr-defined]
        if not all(short):
            ends = ends & torch.tensor(short, device="cpu").to(scores.device, non_blocking=True)[:, None]  # (n, vocab)
        return scores.masked_fill(ends, -math.inf)

    def one(self, row: int, ids: Tensor, logits: Tensor) -> Tensor:
        """(vocab,) processed scores of (vocab,) raw logits after the text `ids` (1, length) of `row`.

        In a batch it is only used if each row can be processed alone; for other processors see `together`.
        """
        scores = logits.to(torch.float32, copy=True)[None]
        for processor in self.processors:
            if self.rows > 1 and type(processor) in BATCH_INDEXED:
                wide = processor(ids.expand(self.rows, -1), scores.repeat(self.rows, 1))
                scores = wide[row : row + 1]
            elif self.rows > 1 and type(processor) is hf.PrefixConstrainedLogitsProcessor:
                scores = _constrained(processor, row)(ids, scores)  # type: ignore[arg-type]
            else:
                scores = processor(ids, scores)
        return scores[0]


def _skipped(processor: hf.RepetitionPenaltyLogitsProcessor, rows: int) -> list[int]:
    """(rows,) the leading tokens of each row that a repetition penalty ignores, such as padding."""
    ignored = processor.prompt_ignore_length
    return ignored.tolist() if isinstance(ignored, Tensor) else [ignored or 0] * rows


def _least(processor: hf.LogitsProcessor) -> int:
    """The shortest length, prompt and padding included, at which a text may end."""
    if isinstance(processor, hf.MinLengthLogitsProcessor):
        return processor.min_length
    assert isinstance(processor, hf.MinNewTokensLengthLogitsProcessor)
    return processor.prompt_length_to_skip + processor.min_new_tokens


def _constrained(processor: hf.PrefixConstrainedLogitsProcessor, row: int) -> hf.PrefixConstrainedLogitsProcessor:
    """The same constraint for one row: the user's function gets the index of the row's prompt."""
    allowed, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams
    return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(prompt, ids), num_beams=1)
