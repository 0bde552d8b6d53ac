"""Falcon (arXiv 2412.12639): semi-autoregressive drafting. One pass predicts a block of k features, and so k tokens.

As in EAGLE-1, entry i holds token i + 1 beside the target's last hidden state of token i. A pass reads the last k
entries, i - k + 1 to i: two LSTM layers turn them into k vectors, and a Llama layer turns those into guesses of the
features i + 1 to i + k. Its attention has the relaxed causal mask: entries of one block see each other and all entries
before. The target's output layer gives a distribution for each guess. The k drafted tokens, beside the guesses, are
the entries of the next block, so a draft may be of any length. Within a block no distribution depends on the tokens
drafted before it.

The output of an entry is a queue of guesses: a pass makes k, and each drafted token takes one. So attention and MLP
run once for every k tokens of a chain or levels of a tree. The other entries only run the LSTM, and add their key and
value.

The paper leaves some details open, and the authors' code (Bestpay-inc/Falcon) decides some differently. These are
reconstructed here:

* The LSTM starts at zero with the first of the k entries, since a head cannot carry a state along the text. In the
  paper it remembers the text. The code hands the LSTM its input with the axes swapped, so that a text trained alone is
  read without any memory.
* A block is the last k entries, wherever a text ends. The code counts blocks from the first entry that it has not yet
  read, so the last k entries may be in two blocks. Entries before the text are zeros.
* Embeddings are normed before the LSTM: those of earlier tokens come from the target, which may scale or shift the
  rows of its table. There is one Llama layer, with its input norm, and no dropout.
* Trees are csdraft's, of any shape. The paper's static trees are not built.

Training is coupled sequential glancing distillation. A first pass without gradients drafts a block after every entry
and counts its wrong tokens: the Hamming distance to the most probable tokens of the target's features. For the second
pass, that number times `glance`, rounded at random, says how many of the block's first entries are replaced by those
that they should predict, token and feature together. So the rest of the block learns to follow its first tokens.
Differences: the paper lowers the factor from 0.4 to 0 in the course of training, here it is constant, 0.2 by default;
the paper counts the mistakes of a whole text, not of each block; keys and values stay those of the text, because
drafts from all entries share them. In later passes of a draft the head reads its own guesses, as every head does in
csdraft. The paper trains one pass. Its losses are `losses: {forward_kl: 0.09, cross_entropy: 0.01}` beside
`regression: 1.0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from csdraft.heads.head import EMBEDDED, LAST, Head, HeadOptions, Steps, regression, step_masks, text_mask
from csdraft.heads.parts import CrossLayer, Rotary

__all__ = ["Falcon", "FalconOptions"]

TEXT, DUE = -1, 1
"""Marks of entries. An entry of the text runs a pass if it is the text's last one; a drafted entry runs one if it
takes the last guess of a queue. Other drafted entries are marked with how many guesses are left, with their own."""
CHUNK = 1024
"""Positions whose logits are in memory at once when wrong tokens are counted."""


@dataclass(frozen=True)
class FalconOptions(HeadOptions):
    """Keys of `init.falcon`. All steps have the same weight, as in the paper.

    Args:
        block: tokens that one pass predicts, k; 2 or more.
        glance: how many entries of a block training replaces, relative to the block's wrong tokens; 0: none.
        regression: weight of the distance between predicted and true features, SmoothL1 averaged over the width.
            `losses` of the recipe weighs the distributions; the paper's ratio is 1 to 0.1.
        noise: training adds uniform noise from -noise to noise to the target's features that the head reads.
    """

    steps: int = 2
    decay: float = 1.0
    block: int = 2
    glance: float = 0.2
    regression: float = 1.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.block <= self.steps:
            raise ValueError(
                f"block={self.block} of a head that trains steps={self.steps}; a block has at least 2 tokens, and "
                "needs as many steps, so that all of them are trained"
            )


class Recurrent(nn.Module):
    """One LSTM layer, which reads k vectors from a state of zeros. Not every device has torch's own."""

    def __init__(self, read: int, width: int):
        super().__init__()
        self.of_input, self.of_state = nn.Linear(read, 4 * width), nn.Linear(width, 4 * width, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., k, width) from (..., k, read)."""
        outputs: list[Tensor] = []
        memory = None
        for gates in self.of_input(vectors).unbind(-2):  # (..., 4 width) each
            if outputs:
                gates = gates + self.of_state(outputs[-1])
            taken, held, new, given = gates.chunk(4, -1)  # torch's order
            new = taken.sigmoid() * new.tanh()
            memory = new if memory is None else held.sigmoid() * memory + new
            outputs.append(given.sigmoid() * memory.tanh())
        return torch.stack(outputs, -2)


class Layer(CrossLayer):
    """A Llama layer whose queries come from blocks of entries, and its keys from one entry each."""

    def forward(self, hidden: Tensor, rotary: Rotary, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """(rows, blocks x k, width) its output, from vectors of the same shape.

        Args:
            keys, values: (rows, heads, slots, head size).
            mask: (rows, 1, blocks x k, slots) bool.
        """
        queries = self.queries(self.input_layernorm(hidden), rotary)
        return self.finished(hidden, self.attended(queries, keys, values, mask))


class Falcon(Head):
    """Falcon.

    A feature is a mark, a queue of k guesses (for an entry of the text, the target's feature and zeros), and what the
    k - 1 entries before held: an embedding and a feature each, the oldest first.
    """

    Options = FalconOptions
    attention_layers = 1
    frozen_output = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: FalconOptions, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        width = config.hidden_size
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lstm = nn.Sequential(Recurrent(2 * width, width), Recurrent(width, width))
        self.layer = Layer(self.config)  # type: ignore[arg-type]
        self.post_init()

    @property
    def feature_width(self) -> int:
        return 1 + (3 * self.options.block - 2) * self.config.hidden_size

    @property
    def before(self) -> int:  # type: ignore[override]
        return self.options.block - 1

    @property
    def taps(self) -> tuple[int, ...]:
        return LAST, EMBEDDED

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        found = {tap: states[tap].to(self.device, self.dtype) for tap in self.taps}
        feature = found[LAST]
        parts = [torch.full_like(feature[..., :1], TEXT), feature]
        parts += [torch.zeros_like(feature)] * self.before  # the rest of the queue
        for back in range(self.before, 0, -1):
            parts += [_earlier(found[EMBEDDED], back - 1), _earlier(feature, back)]
        return torch.cat(parts, -1)

    def first(self, features: Tensor) -> Tensor:
        """(..., width) the first guess of a queue; of an entry of the text, the target's feature."""
        return features[..., 1 : 1 + self.config.hidden_size]

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(self.first(output))

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        mark = features[..., 0]
        wanted = int(torch.where(mark == DUE, 2, (mark == TEXT).long()).amax())  # asks the device, once
        return self._read(input_ids, position_ids, features, mask, cache, (0, 1, mark.shape[1])[wanted])

    def every(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        return self._read(input_ids, position_ids, features, mask, None, input_ids.shape[1])

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """As any head's, with noise on the features and a glance at the first block while it is trained."""
        sees, cache, length = text_mask(position_ids), Steps(), input_ids.shape[1]
        true, shown = self.first(features), None
        if self.training and self.options.noise:
            features = features + self.options.noise * (2 * torch.rand_like(features) - 1) * self._of_features()
        if self.training and self.options.glance:
            shown = self._glance(input_ids, position_ids, features, sees, true)
        for step, mask in enumerate(step_masks(sees, steps)):
            ids, places = input_ids.roll(-1 - step, 1), position_ids + step
            if step:
                features = self.output(ids, places, features, mask, cache)
            else:
                features = self._read(ids, places, features, mask, cache, length, shown)
            yield features

    def _read(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        features: Tensor,
        mask: Tensor | None,
        cache: Any,
        count: int,
        shown: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `output`.

        Args:
            count: how many of the last queries may run a pass.
            shown: (rows, queries, k, 2 width) other entries of the pass, and (rows, queries, k) bool which to take.
        """
        block, width = self.options.block, self.config.hidden_size
        mark, guesses, earlier = features.tensor_split([1, 1 + block * width], -1)
        own = torch.cat([self.embed_tokens(input_ids).to(features.dtype), guesses[..., :width]], -1)
        entries = torch.cat([earlier, own], -1).unflatten(-1, (block, 2 * width))  # (rows, queries, k, 2 width)
        back = torch.arange(1 - block, 1, device=position_ids.device)  # the places of a block's entries, from its last
        blocks = entries * (position_ids[..., None] + back >= 0)[..., None]
        read = self._recurrent(blocks)  # (rows, queries, k, width)
        own = self.layer.input_layernorm(read[..., -1, :])
        keys, values = self.layer.keys_and_values(own, self.rotary(features, position_ids))
        if cache is not None:
            keys, values = cache.update(keys, values, 0)

        kept = entries[..., 1:, :].flatten(-2)
        left = nn.functional.pad(guesses[..., width:], (0, width))
        output = torch.cat([(mark - 1).clamp(min=0), left, kept], -1)
        if not count:
            return output
        if shown is not None:
            read = self._recurrent(torch.where(shown[1][..., None], shown[0], blocks))
        if mask is None:
            queries, slots = input_ids.shape[1], keys.shape[2]
            mask = torch.ones(1, 1, queries, slots, dtype=torch.bool, device=keys.device).tril(slots - queries)
        places = (position_ids[:, -count:, None] + back).flatten(1)  # (rows, count x k)
        hidden, sees = read[:, -count:].flatten(1, 2), mask[:, :, -count:].repeat_interleave(block, 2)
        made = self.layer(hidden, self.rotary(hidden, places), keys, values, sees)  # (rows, count x k, width)
        guesses = made.unflatten(1, (-1, block)).flatten(-2)
        full = torch.cat([torch.full_like(guesses[..., :1], block), guesses, kept[:, -count:]], -1)
        runs = (mark[:, -count:] == DUE) | (mark[:, -count:] == TEXT)
        return torch.cat([output[:, : output.shape[1] - count], torch.where(runs, full, output[:, -count:])], 1)

    def _recurrent(self, entries: Tensor) -> Tensor:
        """(rows, queries, k, width) what the LSTM makes of blocks of entries, (rows, queries, k, 2 width)."""
        embedded, feature = entries.chunk(2, -1)
        return self.lstm(torch.cat([self.norm(embedded), feature], -1))

    # Training.

    def feature_loss(self, outputs: Tensor, features: Tensor) -> Tensor | None:
        return regression(self.options.regression, self.first(outputs), self.first(features))

    def _of_features(self) -> Tensor:
        """(feature width,) 1 where a feature of the text holds the target's, else 0."""
        block, width = self.options.block, self.config.hidden_size
        found = torch.zeros(self.feature_width, device=self.device, dtype=self.dtype)
        self.first(found).fill_(1)
        found[1 + block * width :].view(-1, 2, width)[:, 1] = 1
        return found

    @torch.no_grad()
    def _glance(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, sees: Tensor, true: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the second pass shows of each block that the first pass gets wrong; see `_read`.

        Args:
            true: (rows, length, width) the target's features, without noise.
        """
        ids, block = input_ids.roll(-1, 1), self.options.block
        guesses = self.every(ids, position_ids, features, sees)[..., 1 : 1 + block * self.config.hidden_size]
        best, answers = self._best(true), []  # best: (rows, length)
        wrong = torch.zeros_like(best)
        for place, guess in enumerate(guesses.chunk(block, -1), 1):
            same_text = position_ids.roll(-place, 1) - position_ids == place
            wrong += (self._best(guess) != best.roll(-place, 1)) & same_text
            embedded = self.embed_tokens(ids.roll(-place, 1)).to(true.dtype)
            answers.append(torch.cat([embedded, true.roll(-place, 1)], -1))
        count = (self.options.glance * wrong + torch.rand(wrong.shape, device=wrong.device)).floor()
        count = count.clamp(max=self.before)  # (rows, length)
        return torch.stack(answers, -2), torch.arange(block, device=ids.device) < count[..., None]

    def _best(self, guesses: Tensor) -> Tensor:
        """(rows, length) the most probable draft token of each guess, (rows, length, width)."""
        found = [self.lm_head(part).argmax(-1) for part in guesses.flatten(0, 1).split(CHUNK)]
        return torch.cat(found).view(guesses.shape[:2])


def _earlier(states: Tensor, count: int) -> Tensor:
    """(..., tokens, width) of so many tokens earlier; zeros before the first."""
    return nn.functional.pad(states, (0, 0, count, 0))[..., : states.shape[-2], :]
