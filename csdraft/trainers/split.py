"""A language model in two parts, the body that makes hidden states and the head that makes logits of them.

Families do things of their own between the two: Gemma 2 caps its logits, Cohere and Granite scale them, T5 scales what
the head reads. None of that is repeated here: a head is the model's own forward, run by a stand-in whose body hands
back the hidden states it was given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from csdraft.decoding.names import name_of
from csdraft.models import base_model

__all__ = ["head_of", "hidden_of", "states_of"]

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Relative to the largest logit; 0.05 in shorter dtypes. A head that lacks a step is further off in some logit."""

_splits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models asked about, and whether body and head together are the model."""


def head_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function from hidden states, (positions, width), to logits, (positions, vocab), of the model's family.

    It calls the model's modules, so that hooks run (of sharded or offloaded weights), and may be made before the model
    is wrapped for training. Whether body and head give the model's logits is tried on a few tokens, unless the weights
    are sharded already; if they do not, there is a warning, `hidden_of` returns logits and this the identity.

    Args:
        model: a transformers model with a language-modelling head, or a PEFT wrapper of one.
    """
    return LmHead(base_model(model)) if _can_split(model) else _identity


def hidden_of(model: nn.Module, **inputs: Tensor) -> Tensor:
    """(rows, length, width) hidden states that the model's head reads; without a head to split off, its logits.

    Args:
        model: see `head_of`.
        inputs: as for the model itself: `input_ids`, and `position_ids` and `attention_mask` if wanted; of an
            encoder-decoder also `decoder_input_ids`, whose hidden states are returned.
    """
    if _can_split(model):
        return _hidden(base_model(model), **inputs)
    return model(**inputs, use_cache=False).logits


@dataclass(frozen=True)
class LmHead:
    """See `head_of`.

    Args:
        model: of which all but the body is used. Looked at again in each call, since wrappers replace its parts.
    """

    model: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        modules: dict[str, Any] = dict(self.model._modules)
        for name in _bodies(self.model):
            modules[name] = Given(hidden[None], modules[name])
        stand_in = object.__new__(type(self.model))
        stand_in.__dict__.update(self.model.__dict__, _modules=modules)
        # The class's forward: one set on the model (by accelerate's hooks) would run the model, not the stand-in.
        return type(self.model).forward(stand_in, return_dict=True).logits[0]


class Given:
    """Stands for a model's body: asked for hidden states it returns these, for anything else it asks the body."""

    def __init__(self, hidden: Tensor, body: nn.Module):
        self.output = Output(last_hidden_state=hidden)
        self.body = body
        self.decoder = self  # OPT calls the part and not the whole

    def __call__(self, *inputs: Any, **options: Any) -> Output:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.body, name)


@dataclass
class Output(ModelOutput):
    """What bodies return; all but the hidden states (caches, attentions, router logits) is absent."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def states_of(model: nn.Module, taps: Collection[int], **inputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """What `hidden_of` returns, and hidden states by tap, of a decoder-only model, each (rows, length, width).

    Args:
        taps: 0 is the embeddings, i the output of block i.
        inputs: see `hidden_of`.
    """
    if not taps:
        return hidden_of(model, **inputs), {}
    inner = base_model(model)
    if _can_split(model):
        (name,) = _bodies(inner)
        output = inner.get_submodule(name)(**inputs, use_cache=False, return_dict=True, output_hidden_states=True)
        return output.last_hidden_state, {tap: output.hidden_states[tap] for tap in taps}
    output = model(**inputs, use_cache=False, output_hidden_states=True)
    return output.logits, {tap: output.hidden_states[tap] for tap in taps}


def _bodies(model: nn.Module) -> list[str]:
    """The children that make the hidden states; none if they are not where transformers' families have them."""
    prefix: str = getattr(model, "base_model_prefix", "")
    if prefix in model._modules:
        return [prefix]
    stacks = ["encoder", "decoder"]  # T5's, which stand beside each other in the model
    return stacks if set(stacks) <= set(model._modules) else []


def _hidden(model: nn.Module, **inputs: Tensor) -> Tensor:
    bodies = [model.get_submodule(name) for name in _bodies(model)]
    if len(bodies) == 1:
        return bodies[0](**inputs, use_cache=False, return_dict=True).last_hidden_state
    encoder, decoder = bodies
    mask = inputs.get("attention_mask")
    read = encoder(input_ids=inputs["input_ids"], attention_mask=mask, return_dict=True).last_hidden_state
    return decoder(
        input_ids=inputs["decoder_input_ids"],
        attention_mask=inputs.get("decoder_attention_mask"),
        encoder_hidden_states=read,
        encoder_attention_mask=mask,
        use_cache=False,
        return_dict=True,
    ).last_hidden_state


def _can_split(model: nn.Module) -> bool:
    if model not in _splits:
        sharded = any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters())
        reason = None if sharded and _bodies(base_model(model)) else _difference(model)
        if reason is not None:
            warnings.warn(
                f"{name_of(model)}: {reason}; logits of all positions are held at once, so memory grows with "
                "the length of a batch: use shorter or fewer texts a batch, or a model of another family",
                stacklevel=3,
            )
        _splits[model] = reason is None
    return _splits[model]


@torch.no_grad()
def _difference(model: nn.Module) -> str | None:
    """Why the model is not its body and its head, found by trying; None if it is."""
    inner: Any = base_model(model)
    if not _bodies(inner):
        return "it has no part that makes the hidden states where transformers' families have it"
    inputs = _probe(inner)
    with _evaluating(model):
        whole = model(**inputs, use_cache=False).logits
        try:
            parts = LmHead(inner)(_hidden(inner, **inputs)[0])[None]
        except Exception as error:  # any family's code may fail in its own way
            return f"its body and head cannot be run apart ({type(error).__name__}: {error})"
    whole, parts = whole.float(), parts.float().to(whole.device)
    tolerance = TOLERANCE.get(inner.dtype, 0.05)
    largest = float(whole.nan_to_num(0, 0, 0).abs().max())
    if whole.shape == parts.shape and torch.allclose(parts, whole, tolerance, tolerance * largest, equal_nan=True):
        return None
    return "its body and head, run apart, give other logits than it does"


def _probe(model: Any) -> dict[str, Tensor]:
    """A short text for the model to read."""
    ids = torch.arange(1, 8, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; every module's mode is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _identity(logits: Tensor) -> Tensor:
    return logits
