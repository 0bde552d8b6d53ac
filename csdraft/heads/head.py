"""The base of all drafting heads: a draft vocabulary, reading entry by entry, unrolling in training.

A kind of head, a file of `csdraft/heads/kinds`, defines what it reads (`taps`, `fuse`), what one entry computes
(`output`), and how logits follow from that (`draft_logits`). Entry i reads token i + 1 and the feature of token i. Its
output has two uses: it gives the logits of token i + 2, and in a draft it is the feature of the next entry. So a
head's output must hold everything that the head has to remember from one drafted token to the next.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from csdraft.decoding.feature_session import FeatureModel

__all__ = [
    "EMBEDDED", "LAST", "LENDABLE", "OUTSIDE", "Head", "HeadOptions", "Steps", "compact", "regression",
    "step_masks", "text_mask",
]  # fmt: skip

EMBEDDED, LAST = 0, -1
"""The taps of the target's embedded tokens, and of what its output layer reads: the last hidden state, after the last
norm."""
OUTSIDE = -1e30
"""The logit of a token outside the draft vocabulary. It is finite, so that a processor that allows only such tokens
leaves a distribution. If one token of the draft vocabulary is allowed, the probability of all others is exactly 0."""
LENDABLE = {"embed_tokens.weight": "input.weight", "lm_head.weight": "output.weight"}
"""Parameters that the target can lend to a head -> what they are called in the target, see `embeddings`."""


@dataclass(frozen=True)
class HeadOptions:
    """Keys of `init.NAME` that every kind of head has.

    Args:
        draft_vocab: how many tokens it can draft: the most frequent ones of the training text; None: all.
        steps: drafting steps that training unrolls.
        decay: weight of a step in the loss, relative to the one before.
        config: sizes of its layer, such as intermediate_size; the others are the target's.
    """

    draft_vocab: int | None = None
    steps: int = 4
    decay: float = 0.8
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.decay <= 1:
            raise ValueError(
                f"steps={self.steps}, decay={self.decay} of a head; give at least one step, and a decay above 0 and "
                "at most 1"
            )
        for name in ("glance", "regression", "noise"):
            if not 0 <= (value := getattr(self, name, 0)) < math.inf:
                raise ValueError(f"{name}={value} of a head must be 0 (to leave it out) or more")


class Head(PreTrainedModel, FeatureModel):
    """A drafting head with its embedding. It reads and drafts tokens of the target's vocabulary.

    Args:
        config: sizes; `vocab_size` and `hidden_size` are the target's unless the kind says otherwise.
        options: the kind's own.
        draft_vocab: how many tokens it can draft; None: all.

    Attributes:
        Options: the dataclass of the kind's options in csdraft's own layout; its fields are the keys of `init.NAME`.
        InitOptions: the same for kinds that have another layout.
        layout: the file of `csdraft/heads/formats` that stores such heads.
        attention_layers: how many of its layers keep keys and values.
        output_layer: whether it has an output layer, `lm_head`.
        frozen_output: whether the target lends `lm_head` to a head that drafts all tokens.
        detached: whether training cuts the gradient between one drafting step and the next.
        d2t: (draft vocab,) int64 offsets: draft token i is token i + d2t[i] of the target.
        lent: the parameters that the target lends it, as in `lendable`.
        base: the target that it is for, if that is known.
        stored_by: the class that stores it.
    """

    Options: ClassVar[Any] = HeadOptions
    InitOptions: ClassVar[Any] = HeadOptions
    layout: ClassVar[str] = "own"
    attention_layers: ClassVar[int] = 0
    output_layer: ClassVar[bool] = True
    frozen_output: ClassVar[bool] = False
    detached: ClassVar[bool] = False

    d2t: Tensor
    options: Any
    base: Any = None
    lent: Any = {}  # noqa: RUF012 - replaced, never written to
    stored_by: Any = None

    config_class = LlamaConfig
    _supports_sdpa = True
    _no_split_modules: Any = []  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: Any, draft_vocab: int | None = None):
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa"
        config.num_hidden_layers = self.layers_of(options)
        super().__init__(config)
        self.options, count = options, draft_vocab or config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if self.output_layer:
            self.lm_head = nn.Linear(config.hidden_size, count, bias=False)
        self.register_buffer("d2t", torch.zeros(count, dtype=torch.long))
        self.make_buffers()

    # What a kind defines.

    @classmethod
    def layers_of(cls, options: Any) -> int:
        """How many of its layers keep keys and values; a kind overrides it where the options decide."""
        return cls.attention_layers

    @classmethod
    def fitted(cls, options: Any, text: Any, draft_vocab: int) -> Any:
        """The options of a head for a target: those that were asked for, completed; ValueError if it cannot have them.

        Args:
            text: the target's text config.
        """
        return replace(options, draft_vocab=draft_vocab)

    @property
    def taps(self) -> tuple[int, ...]:
        return (LAST,)

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        """(..., feature width) features from the target's hidden states, (..., target's width) by tap.

        By default the last state, followed by zeros if features are wider.
        """
        last = states[LAST].to(self.device, self.dtype)
        more = self.feature_width - last.shape[-1]
        return nn.functional.pad(last, (0, more)) if more else last

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, feature width) what each entry computes: the feature of the next entry.

        Args:
            input_ids, position_ids: (rows, queries) tokens, and numbers of entries.
            features: (rows, queries, feature width) `fuse` of the target's hidden states, or its own output.
            mask: (rows, 1, queries, slots) bool; None is an ordinary causal mask.
            cache: keeps keys and values.
        """
        raise NotImplementedError

    def every(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """(rows, length, feature width) outputs of a text's entries, each computed as if it were the last.

        `output` may leave out what only the last entry of a text needs.
        """
        return self.output(input_ids, position_ids, features, mask, None)

    def draft_logits(self, output: Tensor) -> Tensor:
        """(..., draft vocab) logits from outputs, (..., feature width)."""
        return self.lm_head(output)

    def start(self, rows: Tensor) -> None:
        """Sets those weights of a new head that do not start at random.

        Args:
            rows: (draft vocab, target's width) of the target's output layer.
        """
        if self.output_layer and rows.shape == self.lm_head.weight.shape:
            self.lm_head.weight.copy_(rows)

    def feature_loss(self, outputs: Tensor, features: Tensor) -> Tensor | None:
        """The sum of an additional loss of one drafting step in training; None: there is none.

        Args:
            outputs: (positions, feature width) computed by the head.
            features: (positions, feature width) the target's at the same places.
        """

    # What all kinds share.

    def make_buffers(self) -> None:
        """Makes the rotary embedding, which has no weights."""
        if self.config.num_hidden_layers:
            self.rotary = LlamaRotaryEmbedding(self.config)  # type: ignore[arg-type]

    def lendable(self) -> dict[str, str]:
        """The parameters that the target can lend it -> what they are called in the target, see `embeddings`."""
        output = self.frozen_output and len(self.d2t) == self.config.vocab_size
        return {name: theirs for name, theirs in LENDABLE.items() if output or name != "lm_head.weight"}

    @property
    def drafted(self) -> Tensor:
        """(draft vocab,) int64 the target's ids of the tokens that it can draft, ascending."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def spread(self, logits: Tensor) -> Tensor:
        """(..., vocab) logits from those of the draft vocabulary, `OUTSIDE` for tokens that it cannot draft."""
        if len(self.d2t) == self.config.vocab_size:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), OUTSIDE, dtype=torch.float32)
        return full.index_copy_(-1, self.drafted, logits.float())

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """Reads entries; see `output` and `FeatureSession`. The only hidden state is the head's own output.

        Args:
            logits_to_keep: how many of the last queries get logits; 0: all.
        """
        output = self.output(input_ids, position_ids, features, attention_mask, cache)
        logits = self.spread(self.draft_logits(compact(output[:, -logits_to_keep:])))
        return CausalLMOutput(logits=logits, hidden_states=(output,))

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """What it computes at each step of a draft, for drafts that start at every entry (training-time test).

        Step 0 reads the target's features. Step s continues each draft: it reads the text's own next token and the
        output of step s - 1, and sees step 0 of all earlier entries and all steps of its own draft. Texts that share a
        row do not see each other.

        Args:
            input_ids, position_ids: (rows, length) the texts; positions restart with each.
            features: (rows, length, feature width) of the target.

        Yields:
            (rows, length, feature width) of step s: output i predicts token i + 2 + s, if that is of the same text.
        """
        cache = Steps()
        for step, mask in enumerate(step_masks(text_mask(position_ids), steps)):
            ids = input_ids.roll(-1 - step, 1)  # tokens that wrap around reach no entry that counts
            output = self.output(ids, position_ids + step, features, mask, cache)
            yield output
            features = output.detach() if self.detached else output

    def along(self, states: Mapping[int, Tensor], input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        features, seen = self.fuse(states)[:, :-1], mask[:, :-1].bool()  # (rows, length - 1, ...)
        square = seen.new_ones(seen.shape[1], seen.shape[1])
        itself = torch.eye(len(square), dtype=torch.bool, device=seen.device)
        causal = (square.tril() & seen[:, None]) | itself  # (rows, length - 1, length - 1)
        outputs = self.every(input_ids[:, 1:], position_ids[:, 1:] - 1, features, causal[:, None])
        return nn.functional.pad(self.spread(self.draft_logits(outputs)), (0, 0, 1, 0))


def compact(states: Tensor) -> Tensor:
    """A copy of a view of larger states: PyTorch multiplies a frozen weight by such a view once for each row."""
    return states.clone(memory_format=torch.contiguous_format)


def regression(weight: float, outputs: Tensor, features: Tensor) -> Tensor | None:
    """Smooth L1 between two (positions, width), a mean over the width; None if its weight is 0."""
    if not weight:
        return None
    off = smooth_l1_loss(outputs.float(), features.float(), reduction="none")  # (positions, width)
    return weight * off.mean(-1).sum()


class Steps:
    """The cache of attention that reads a text several times: each reading sees the keys and values of all before.

    Args:
        cache: keeps the first reading of each layer for later forwards; None: nothing is kept.
    """

    def __init__(self, cache: Any = None) -> None:
        self.cache = cache
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # by layer

    def update(self, keys: Tensor, values: Tensor, layer: int = 0, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """(rows, heads, slots, head size) keys and values that the queries may see."""
        if layer in self.held:
            keys, values = torch.cat([self.held[layer][0], keys], 2), torch.cat([self.held[layer][1], values], 2)
        elif self.cache is not None:
            keys, values = self.cache.update(keys, values, layer, *rest, **more)
        self.held[layer] = keys, values
        return keys, values


def text_mask(position_ids: Tensor) -> Tensor:
    """(rows, 1, length, length) bool: an entry sees itself and the earlier entries of its own text.

    Args:
        position_ids: (rows, length) of texts that share a row; positions restart with each.
    """
    starts = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1  # (rows, length)
    text = starts.cumsum(1)  # (rows, length) the number of each entry's text
    order = torch.arange(position_ids.shape[1], device=position_ids.device)
    return ((order[:, None] >= order) & (text[:, :, None] == text[:, None, :]))[:, None]


def step_masks(sees: Tensor, steps: int) -> Iterator[Tensor]:
    """(rows, 1, length, (step + 1) x length) bool masks, one for each drafting step of `Head.unrolled`.

    Args:
        sees: (rows, 1, length, length) bool: what entries of the text see.
    """
    itself = torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device).expand_as(sees)
    for step in range(steps):
        yield torch.cat([sees, *[itself] * step], -1)
