"""EAGLE-3 as a student: unrolled as it drafts, on features that the target computes in the same pass.

Training-time test (arXiv 2503.01840): step s reads what the head itself computed at step s - 1, and the text's own
tokens. A position counts where the next token is one that the head can draft; both distributions are then compared
over the draft vocabulary alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csdraft import spec
from csdraft.data.packing import IGNORED
from csdraft.heads.eagle3 import Eagle3, HeadOptions, default_layers
from csdraft.heads.eagle3_files import SWITCHING, Eagle3Head
from csdraft.heads.layers import embeddings, fingerprint
from csdraft.heads.self_draft import model_name
from csdraft.heads.tied import Lender
from csdraft.stored import fit
from csdraft.trainers.new_students import new_config
from csdraft.trainers.students._kind import Compared, Counts, HeadKind, Logits

__all__ = ["Eagle3Student"]

LIKE_TARGET = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps")
"""What the layer takes over from a target that states it."""


@dataclass(frozen=True)
class Options:
    """Keys of `init.eagle3`.

    Args:
        layers: hidden states of the target that are fused, k for the one after k blocks; None: 2, L/2, L - 3.
        draft_vocab: how many tokens it can draft, the most frequent of the training text; None: all.
        steps: drafting steps that training unrolls.
        decay: weight of a step, relative to the one before.
        config: options of the layer's LlamaConfig; those not given are the target's.
    """

    layers: tuple[int, ...] | None = None
    draft_vocab: int | None = None
    steps: int = 4
    decay: float = 0.8
    config: dict[str, Any] | None = None


class Eagle3Student(HeadKind):
    """See `HeadKind`."""

    trains = Eagle3

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        asked = fit(options, Options, "init.eagle3")
        if config.is_encoder_decoder:
            raise ValueError(f"init.eagle3: a {config.model_type!r} target is an encoder-decoder, which no head reads")
        text = config.get_text_config(decoder=True)
        count, vocab = text.num_hidden_layers, text.vocab_size
        layers = asked.layers or default_layers(count)
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= count:
            raise ValueError(
                f"init.eagle3: layers={list(layers)} must be rising numbers from 0 to {count}, the target's"
            )
        if asked.draft_vocab is not None and not 0 < asked.draft_vocab <= vocab:
            raise ValueError(
                f"init.eagle3: draft_vocab={asked.draft_vocab} must be from 1 to {vocab}, the target's tokens"
            )
        if asked.steps < 1 or not 0 < asked.decay <= 1:
            raise ValueError(
                f"init.eagle3: steps={asked.steps}, decay={asked.decay}; it takes at least one step, and a decay "
                "above 0 and at most 1"
            )
        _layer_config(text, asked)

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        asked, text = fit(options, Options, "init.eagle3"), target.config.get_text_config(decoder=True)
        layers = asked.layers or default_layers(text.num_hidden_layers)
        drafted = _most_frequent(asked.draft_vocab, target, counts)
        head = Eagle3(_layer_config(text, asked), HeadOptions(tuple(layers), text.hidden_size, len(drafted))).float()
        theirs = embeddings(target)
        rows = theirs.get("output.weight", theirs["input.weight"]).detach().float()
        with torch.no_grad():
            head.embed_tokens.weight.copy_(theirs["input.weight"])
            if rows.shape[1] == head.config.hidden_size:
                head.lm_head.weight.copy_(rows[drafted.to(rows.device)])
        head.embed_tokens.weight.requires_grad_(False)
        head.d2t.copy_(drafted - torch.arange(len(drafted)))
        head.lent, head.stored_by = {"embed_tokens.weight": "input.weight"}, Eagle3Head
        revision = getattr(target.config, "_commit_hash", None)
        head.base = Lender(model_name(target), revision, fingerprint(target), text.vocab_size)
        head.unrolled_steps, head.decay = asked.steps, asked.decay
        return head

    def compared(
        self,
        head: Any,
        states: Mapping[int, Tensor],
        hidden: Tensor,
        target_logits: Logits,
        labels: Tensor,
        inputs: Any,
    ) -> Iterator[Compared]:
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        drafted = head.drafted
        numbers = torch.full((head.config.vocab_size,), IGNORED, device=labels.device)  # (vocab,) as the head has them
        numbers[drafted] = torch.arange(len(drafted), device=labels.device)
        labels = torch.where(labels == IGNORED, labels, numbers[labels.clamp(min=0)])
        weights = [head.decay**step for step in range(head.unrolled_steps)]

        def of_drafted(chosen: Tensor) -> Tensor:
            return target_logits(chosen)[:, drafted.to(chosen.device)]

        outputs = head.unrolled(ids, positions, head.fuse(states), head.unrolled_steps)
        for step, (weight, output) in enumerate(zip(weights, outputs, strict=True)):
            wanted = labels[:, 2 + step :]  # entry i predicts token i + 2 + step, the target at the position before
            length = wanted.shape[1]
            # Still of the entry's own text: positions rise by 1 from one token to the next.
            same = positions[:, 2 + step :] - positions[:, :length] == 2 + step
            counted = (wanted != IGNORED) & same
            theirs = hidden[:, 1 + step : 1 + step + length][counted.to(hidden.device)]
            yield Compared(
                weight / sum(weights),
                output[:, :length][counted],
                theirs,
                wanted[counted],
                head.draft_logits,
                of_drafted,
            )


def _layer_config(text: Any, asked: Options) -> Any:
    """Of the layer: the target's shape, changed by what was asked."""
    like = {key: getattr(text, key) for key in LIKE_TARGET if getattr(text, key, None) is not None}
    rotary = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" in rotary and rotary.get("rope_type") not in SWITCHING:
        like["rope_parameters"] = {key: rotary[key] for key in rotary if key != "partial_rotary_factor"}
    spec.check_keys(asked.config or {}, sorted({*LIKE_TARGET, "rope_parameters"}), "init.eagle3.config")
    like |= {"model_type": "llama", "hidden_size": text.hidden_size, "num_hidden_layers": 1}
    return new_config(text, {**like, **(asked.config or {})})


def _most_frequent(count: int | None, target: Any, counts: Counts | None) -> Tensor:
    """(draft vocab,) ids of the tokens that it can draft, ascending: those that end a text are always among them."""
    vocab = target.config.get_text_config(decoder=True).vocab_size
    if count is None or count == vocab:
        return torch.arange(vocab)
    if counts is None:
        raise ValueError(
            f"init.eagle3: draft_vocab={count} is chosen by the training text; give that, or leave it out"
        )
    found = counts().clone()
    ends = target.generation_config.eos_token_id
    found[torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else ends, dtype=torch.long)] = 1 << 60
    return found.argsort(descending=True, stable=True)[:count].sort().values
