"""A CTC drafter (arXiv 2412.00061): one forward gives frames, and each frame holds a token, a repetition, or nothing.

Each frame has a distribution over the draft vocabulary and a blank. A path takes one symbol from each frame. Merging
its repetitions and dropping its blanks gives the path's text, so the probability of a text is a sum over paths. Unlike
a parallel head, no frame is tied to one position of the draft.

The paper searches for likely texts and drafts those, without probabilities for single tokens. Here each token is
drafted from its exact conditional distribution. After drafted tokens y, the probability of token v is the probability
that a path's text starts with y v, divided by the probability that it starts with y and continues. The forward
recursion of CTC gives both, for each number of frames: `ended` for paths that end in a blank, `held` for paths that
end in the last token of y. The head carries it from one drafted token to the next.

The frames are the outputs of a parallel head (`csdraft/heads/kinds/parallel.py`); there are more of them than tokens.
Each further token costs an output layer of all frames.

The paper trains on the CTC loss of the target's text, the logarithm of a sum over all paths. It equals the sum of the
logarithms of the tokens' conditional probabilities. Here each conditional distribution is compared with the target's,
by the recipe's losses: with cross-entropy on the target's own text the sum is the CTC loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from csdraft.heads.head import compact, text_mask
from csdraft.heads.kinds.parallel import Parallel, ParallelOptions

__all__ = ["Ctc", "CtcOptions"]

LOW = -1e3
"""Log-probability that counts as 0."""
BASE, DIGITS = 256, 3
"""A feature holds a token's number as digits, which bfloat16 can hold exactly."""


@dataclass(frozen=True)
class CtcOptions(ParallelOptions):
    """What distinguishes one CTC head from another; keys of `init.ctc`.

    Args:
        frames: how many frames one forward gives; `steps` tokens are drafted from them.
    """

    frames: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < self.steps:
            raise ValueError(
                f"frames={self.frames} of a CTC head that drafts steps={self.steps} tokens: each token needs a frame; "
                f"give frames={self.steps} or more"
            )


class State(NamedTuple):
    """The state that the head carries from one drafted token to the next.

    Attributes:
        frames: (..., frames, width) outputs, normed.
        total: (..., frames) logarithm of the sum over all symbols of a frame.
        held, ended: (..., frames + 1) log-probability, up to a constant, that a path over the first 0, 1, ... frames
            gives the drafted tokens and ends in the last of them (held) or in a blank (ended).
        last: (..., 3) digits of the last drafted token's number in the draft vocabulary, from 1; 0: no token yet.
    """

    frames: Tensor
    total: Tensor
    held: Tensor
    ended: Tensor
    last: Tensor


class Ctc(Parallel):
    """A CTC head. Modules have the names of a parallel head's."""

    Options = CtcOptions
    layout = "own"

    def __init__(self, config: LlamaConfig, options: CtcOptions, draft_vocab: int | None = None):
        super().__init__(config, options)
        self.blank = nn.Linear(config.hidden_size, 1, bias=False)

    @property
    def outputs(self) -> int:
        return self.options.frames

    @property
    def feature_width(self) -> int:
        frames = self.options.frames
        return 1 + frames * self.config.hidden_size + frames + 2 * (frames + 1) + DIGITS

    def draft_logits(self, output: Tensor) -> Tensor:
        state = self._state(output)
        scores = self.lm_head(compact(state.frames)).float() - state.total[..., None]  # (..., frames, draft vocab)
        either = torch.logaddexp(state.held, state.ended)[..., :-1, None]
        logits = (scores + either).logsumexp(-2)
        last = _number(state.last)[..., None] - 1  # (..., 1); -1: no token yet
        place = last.clamp(min=0)
        own = scores.gather(-1, place[..., None, :].expand(*scores.shape[:-1], 1))  # (..., frames, 1)
        again = (own + state.ended[..., :-1, None]).logsumexp(-2)  # the same token again takes a blank between
        return logits.scatter(-1, place, torch.where(last < 0, logits.gather(-1, place), again))

    def begun(self, outputs: Tensor) -> Tensor:
        frames = self.norm(outputs)
        of_blank = _scored(frames, self.blank.weight[0])
        if torch.is_grad_enabled():  # row by row, and once more in the backward pass: logits of all frames are large
            rows = zip(frames, of_blank, strict=True)
            total = torch.stack([checkpoint(self._total, *row, use_reentrant=False) for row in rows])
        else:
            total = self._total(frames, of_blank)
        ended = nn.functional.pad((of_blank - total).cumsum(-1), (1, 0))
        none = frames.new_zeros(*total.shape[:-1], DIGITS)
        return _joined(State(frames, total, torch.full_like(ended, LOW), ended, none))

    def _total(self, frames: Tensor, of_blank: Tensor) -> Tensor:
        """(..., frames) logarithm of the sum over all symbols, from frames and the logits of their blanks."""
        return torch.logaddexp(self.lm_head(frames).float().logsumexp(-1), of_blank)

    def taken(self, input_ids: Tensor, features: Tensor) -> Tensor:
        state, drafted = self._state(features), self.drafted
        place = torch.searchsorted(drafted, input_ids).clamp(max=len(drafted) - 1)
        known = drafted[place] == input_ids
        of_token = _scored(state.frames, self.lm_head.weight[place][..., None, :]) - state.total  # (..., frames)
        of_token = of_token.where(known[..., None], LOW)
        of_blank = _scored(state.frames, self.blank.weight[0]) - state.total
        repeated = (_number(state.last) == place + 1)[..., None]
        before = torch.logaddexp(state.ended, state.held.masked_fill(repeated, LOW))  # (..., frames + 1)
        held, ended = [torch.full_like(before[..., 0], LOW)], [torch.full_like(before[..., 0], LOW)]
        for frame in range(self.options.frames):
            ended.append(of_blank[..., frame] + torch.logaddexp(ended[-1], held[-1]))
            held.append(of_token[..., frame] + torch.logaddexp(held[-1], before[..., frame]))
        paths = torch.stack([torch.stack(held, -1), torch.stack(ended, -1)])
        paths = (paths - paths.amax((0, -1), keepdim=True)).clamp(min=LOW)
        return _joined(State(state.frames, state.total, paths[0], paths[1], _digits(place + 1).to(features)))

    def every(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        return self.begun(torch.stack(list(self._groups(input_ids, position_ids, features, mask, self.outputs)), 2))

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """Makes the frames of all entries at once, then takes the text's tokens one after the other."""
        output = self.every(input_ids.roll(-1, 1), position_ids, features, text_mask(position_ids))
        for step in range(steps):
            yield output
            output = self.taken(input_ids.roll(-2 - step, 1), output)

    def _state(self, feature: Tensor) -> State:
        frames, width = self.options.frames, self.config.hidden_size
        sizes = [1, frames * width, frames, frames + 1, frames + 1, DIGITS]
        _, hidden, total, held, ended, last = feature.split(sizes, -1)
        return State(hidden.unflatten(-1, (frames, width)), total.float(), held.float(), ended.float(), last)


def _scored(frames: Tensor, row: Tensor) -> Tensor:
    """(...) logits of one symbol in frames, (..., width), from the symbol's row of the output layer."""
    return (frames * row).sum(-1).float()


def _joined(state: State) -> Tensor:
    """(..., feature width) an empty mark, then a state."""
    parts = [state.frames.flatten(-2), state.total, state.held, state.ended, state.last]
    return nn.functional.pad(torch.cat([part.to(state.frames.dtype) for part in parts], -1), (1, 0))


def _digits(numbers: Tensor) -> Tensor:
    """(..., 3) digits of whole numbers, the least significant first."""
    return torch.stack([numbers // BASE**digit % BASE for digit in range(DIGITS)], -1)


def _number(digits: Tensor) -> Tensor:
    """(...) whole numbers from digits, (..., 3)."""
    return sum(digits[..., digit].long() * BASE**digit for digit in range(DIGITS))  # type: ignore[return-value]
