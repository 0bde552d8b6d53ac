"""EAGLE-3 (arXiv 2503.01840): one decoder layer that drafts from three hidden states of the target.

Entry i of the head reads token i + 1 and the feature of token i, and predicts token i + 2. The feature is the
target's hidden states after three blocks, fused by one matrix. The layer's attention reads [norm(embedding),
norm(feature)], its residual is the feature, and its output, before the last norm, is the feature of the next entry
while the head drafts on its own. The output layer has rows for the draft vocabulary only: all other tokens get
probability 0.

The layer is made of transformers' Llama parts; only what EAGLE-3 changes of them is written here. Names of modules are
those of published checkpoints (`csdraft/heads/eagle3_files.py` reads and writes them).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from csdraft.decoding.cache_names import cache_name
from csdraft.decoding.feature_session import FeatureModel

__all__ = ["OUTSIDE", "Eagle3", "Eagle3Output", "HeadOptions", "default_layers"]

OUTSIDE = -1e30
"""The logit of a token outside the draft vocabulary. Finite, so that a processor that allows only such tokens leaves a
distribution; as long as one token of the draft vocabulary is allowed, the probability of all others is exactly 0."""


@dataclass(frozen=True)
class HeadOptions:
    """What makes one EAGLE-3 head differ from another, beside its layer's config.

    Args:
        layers: hidden states of the target that are fused: k stands for the one after k blocks.
        target_width: their width.
        draft_vocab: tokens that it can draft.
        norm_before_residual: whether the residual is the normed feature.
        norm_before_fc: whether the hidden states are normed together before they are fused.
        fc_norm: whether each hidden state is normed before they are fused.
        norm_output: whether the feature that it hands on is normed.
    """

    layers: tuple[int, ...]
    target_width: int
    draft_vocab: int
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False


def default_layers(count: int) -> tuple[int, int, int]:
    """The hidden states that EAGLE-3 fuses of a target of `count` layers; ValueError if it has too few."""
    if count < 6:
        raise ValueError(
            f"an EAGLE-3 head reads the hidden states after blocks 2, L/2 and L - 3 by default, and the target has "
            f"L={count} layers; name others by layers, such as {list(range(min(3, count)))}"
        )
    return 2, count // 2, count - 3


@dataclass
class Eagle3Output(ModelOutput):
    """Logits of all tokens of the target, and the head's own output (one entry, before the last norm)."""

    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Layer(nn.Module):
    """The one decoder layer: attention reads the embedding and the feature side by side."""

    def __init__(self, config: LlamaConfig, norm_before_residual: bool):
        super().__init__()
        width, self.norm_before_residual = config.hidden_size, norm_before_residual
        self.self_attn = LlamaAttention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * width, old.out_features, bias=old.bias is not None))
        self.mlp = LlamaMLP(config)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            LlamaRMSNorm(width, config.rms_norm_eps) for _ in range(3)
        )
        self._cache_name = cache_name(LlamaAttention.forward) or ""

    def forward(
        self, embedded: Tensor, features: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) its output; embeddings and features are of that shape, too."""
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        both = torch.cat([self.input_layernorm(embedded), normed], -1)  # (rows, queries, 2 width)
        mixed, _ = self.self_attn(both, rotary, mask, **{self._cache_name: cache})
        residual = residual + mixed
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3(PreTrainedModel, FeatureModel):
    """An EAGLE-3 head, complete with an embedding: of the target's vocabulary in, of the target's vocabulary out.

    Args:
        config: of the layer; `vocab_size` is the target's.
        options: see `HeadOptions`.

    Attributes:
        d2t: (draft vocab,) int64 offsets: draft token i is token i + d2t[i] of the target.
        lent: names of the parameters that are the target's -> what they are there, see `embeddings`.
        base: the target that it is for, if that is known.
        stored_by: the class that stores it.
        unrolled_steps, decay: how it is trained: drafting steps, and each one's weight relative to the one before.
    """

    d2t: Tensor
    base: Any = None
    lent: Any = {}  # noqa: RUF012 - replaced, never written to
    stored_by: Any = None
    unrolled_steps: Any = 4
    decay: Any = 0.8

    config_class = LlamaConfig
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: HeadOptions):
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa"
        config.num_hidden_layers = 1
        super().__init__(config)
        self.options, width, count = options, config.hidden_size, len(options.layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if options.norm_before_fc:
            self.input_norm = LlamaRMSNorm(count * options.target_width, config.rms_norm_eps)
        if options.fc_norm:
            norms = (LlamaRMSNorm(options.target_width, config.rms_norm_eps) for _ in range(count))
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(count * options.target_width, width, bias=False)
        self.midlayer = Layer(config, options.norm_before_residual)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, options.draft_vocab, bias=False)
        self.register_buffer("d2t", torch.zeros(options.draft_vocab, dtype=torch.long))
        self.rotary = self.new_rotary()
        self.post_init()

    def new_rotary(self) -> nn.Module:
        """The rotary embedding, which has no weights."""
        return LlamaRotaryEmbedding(self.config)  # type: ignore[arg-type]

    @property
    def taps(self) -> tuple[int, ...]:
        return self.options.layers

    @property
    def drafted(self) -> Tensor:
        """(draft vocab,) int64 the target's ids of the tokens that it can draft, ascending."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        """(..., width) features from the target's hidden states, (..., target's width) by tap."""
        parts = [states[tap].to(self.fc.weight.device, self.fc.weight.dtype) for tap in self.taps]
        if self.options.fc_norm:
            parts = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        joined = torch.cat(parts, -1)
        return self.fc(self.input_norm(joined) if self.options.norm_before_fc else joined)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """(..., draft vocab) logits of its own output."""
        return self.lm_head(hidden if self.options.norm_output else self.norm(hidden))

    def spread(self, logits: Tensor) -> Tensor:
        """(..., vocab) logits from those of the draft vocabulary, `OUTSIDE` for tokens that it cannot draft."""
        if len(self.d2t) == self.config.vocab_size:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), OUTSIDE, dtype=torch.float32)
        return full.index_copy_(-1, self.drafted, logits.float())

    def layer_output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) the feature of the next entry."""
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        output = self.midlayer(embedded, features, self.rotary(features, position_ids), mask, cache)
        return self.norm(output) if self.options.norm_output else output

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
    ) -> Eagle3Output:
        """One reading of entries; see `FeatureSession`.

        Args:
            input_ids, position_ids: (rows, queries) tokens, and numbers of entries.
            features: (rows, queries, width) `fuse` of the target's hidden states, or its own output.
            attention_mask: (rows, 1, queries, slots) bool; None is an ordinary causal mask.
            cache: takes keys and values.
            logits_to_keep: logits of so many last queries; 0 is all.
        """
        output = self.layer_output(input_ids, position_ids, features, attention_mask, cache)
        logits = self.spread(self.draft_logits(output[:, -logits_to_keep:]))
        return Eagle3Output(logits=logits, hidden_states=(output,))

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """What it computes at each of some steps of drafting, from every entry at once (training-time test).

        Step 0 reads the target's features. Step s goes on from each entry for itself: it reads the text's own next
        token and what step s - 1 computed there, and sees step 0 of all earlier entries and its own steps. Texts that
        share a row do not see each other.

        Args:
            input_ids, position_ids: (rows, length) the texts; positions restart with each.
            features: (rows, length, width) of the target.

        Yields:
            (rows, length, width) of step s: output i predicts token i + 2 + s, if that is of the same text.
        """
        rows, length = input_ids.shape
        starts = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1  # (rows, length)
        text = starts.cumsum(1)
        order = torch.arange(length, device=input_ids.device)
        sees = (order[:, None] >= order) & (text[:, :, None] == text[:, None, :])  # (rows, length, length)
        itself = (order[:, None] == order).expand(rows, -1, -1)
        cache = Steps()
        for step in range(steps):
            ids = input_ids.roll(-1 - step, 1)  # what comes round at the end is seen by no entry that counts
            mask = torch.cat([sees, *[itself] * step], -1)[:, None]  # (rows, 1, length, (step + 1) length)
            features = self.layer_output(ids, position_ids + step, features, mask, cache)
            yield features

    def along(self, states: Mapping[int, Tensor], input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        features, seen = self.fuse(states)[:, :-1], mask[:, :-1].bool()
        square = seen.new_ones(seen.shape[1], seen.shape[1])
        causal = (square.tril() & seen[:, None]) | torch.eye(len(square), dtype=torch.bool, device=seen.device)
        output = self(input_ids[:, 1:], features, position_ids[:, 1:] - 1, causal[:, None])
        assert output.logits is not None
        return nn.functional.pad(output.logits, (0, 0, 1, 0))


class Steps:
    """Keys and values of all steps so far, one behind the other: what attention calls its cache in training."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(rows, heads, steps x length, head size) each."""
        new = keys, values
        if self.held is not None:
            new = torch.cat([self.held[0], keys], 2), torch.cat([self.held[1], values], 2)
        self.held = new
        return new
