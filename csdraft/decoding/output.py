"""What `generate` returns: sequences, streamed tokens, and scores or logits of the right length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Round
from csdraft.decoding.text import Text

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from csdraft.reports.report import Report

__all__ = ["DraftedDecoderOnlyOutput", "DraftedEncoderDecoderOutput", "Output", "RoundStreamer"]


class RoundStreamer(BaseStreamer):
    """A streamer that gets whole rounds instead of one `put` for each token, so it knows who chose each token."""

    def put_round(self, finished: Round) -> None:
        """Receives a finished round: its `tokens`, their `levels`; `context.call` has the names of the levels."""
        raise NotImplementedError


@dataclass
class DraftedDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """`generate`'s usual output and the report of the call."""

    report: Report | None = None


@dataclass
class DraftedEncoderDecoderOutput(GenerateEncoderDecoderOutput):
    """`generate`'s usual output of an encoder-decoder and the report of the call."""

    report: Report | None = None


class Output:
    """Takes the emitted tokens as rounds finish.

    Args:
        config: the generation config, which says what to return.
        rows: batch size.
        streamer: gets every token of a single row as it is emitted, or every round if it is a `RoundStreamer`.
    """

    def __init__(self, config: GenerationConfig, rows: int, streamer: BaseStreamer | None = None):
        self.config, self.rows, self.streamer = config, rows, streamer
        wanted = config.return_dict_in_generate
        self.scores: list[list[Tensor]] | None = [[] for _ in range(rows)] if wanted and config.output_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in range(rows)] if wanted and config.output_logits else None

    def take(self, rounds: Sequence[Round]) -> None:
        """Streams the tokens of finished rounds and keeps their scores, before the text is extended."""
        for finished in rounds:
            row = finished.context.row
            if self.scores is not None or self.logits is not None:
                nodes = [ROOT, *finished.verdict.accepted][: len(finished.tokens)]
                view: Any = finished.scores
                if self.scores is not None:
                    self.scores[row] += [view.processed(node).float().clone() for node in nodes]
                if self.logits is not None:
                    self.logits[row] += [view.raw(node).to(torch.float32, copy=True) for node in nodes]
            if isinstance(self.streamer, RoundStreamer):
                self.streamer.put_round(finished)
            elif self.streamer is not None:
                for token in finished.tokens:
                    self.streamer.put(torch.tensor([token], device="cpu"))

    def sequences(self, input_ids: Tensor, texts: Sequence[Text]) -> Tensor:
        """(rows, longest) the user's ids, then the new tokens, padded on the right."""
        new = [text.new_tokens for text in texts]
        longest = max(len(tokens) for tokens in new)
        padding = self._pad_token if any(len(tokens) < longest for tokens in new) else 0
        table = [tokens + [padding] * (longest - len(tokens)) for tokens in new]
        made = torch.tensor(table, dtype=input_ids.dtype, device=input_ids.device).view(len(new), longest)
        return torch.cat([input_ids, made], 1)

    @property
    def _pad_token(self) -> int:
        pad = self.config._pad_token_tensor
        if pad is None:
            raise ValueError("rows end at different lengths, but pad_token_id is None; set pad_token_id")
        return int(pad.view(-1)[0])

    def _stack(self, kept: list[list[Tensor]] | None, ended: bool) -> tuple[Tensor, ...] | None:
        """Per step a (rows, vocab) tensor; after a row's end -inf, but 0 at the pad token (raw logits: all zeros)."""
        if kept is None:
            return None
        steps = []
        for step in range(max(len(rows) for rows in kept)):
            example = next(rows[step] for rows in kept if len(rows) > step)
            filler = torch.zeros_like(example)
            if ended and any(len(rows) <= step for rows in kept):
                filler = torch.full_like(example, float("-inf"))
                filler[self._pad_token] = 0.0
            steps.append(torch.stack([rows[step] if len(rows) > step else filler for rows in kept]))
        return tuple(steps)

    def pack(self, sequences: Tensor, report: Report, past: Any, encoder_outputs: Any = None) -> Any:
        """The return value of `generate`."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return sequences
        common = {
            "sequences": sequences,
            "scores": self._stack(self.scores, True),
            "logits": self._stack(self.logits, False),
            GENERATE_CACHE: past,
            "report": report,
        }
        if encoder_outputs is None:
            return DraftedDecoderOnlyOutput(**common)
        return DraftedEncoderDecoderOutput(**common)
