"""Splits a language model into its body, which computes hidden states, and its head, which computes logits from them.

Families add steps between the two: Gemma 2 caps its logits, Cohere and Granite scale them, T5 scales what the head
reads. None of that is repeated here: a head is the model's own forward, run on a stand-in whose body returns the
hidden states it was given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from csdraft.decoding.names import name_of
from csdraft.decoding.traits import tapped
from csdraft.models import base_model

__all__ = ["close", "evaluating", "head_of", "hidden_of", "logits_of", "probe", "states_of"]

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Allowed difference relative to the largest logit; 0.05 in other dtypes. A missing step in a head differs more."""

MASKED = 1e30
"""A logit beyond it stands for a token that the model never predicts; nan and infinity are beyond it."""

_splits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Model -> whether its body and head together compute the same as the model."""


def head_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function from hidden states, (positions, width), to the model's logits, (positions, vocab).

    It calls the model's modules, so that the hooks of sharded or offloaded weights run. It may be made before the
    model is wrapped for training. Unless the weights are sharded already, body and head are tried on a few tokens. If
    they do not give the model's logits, there is a warning, `hidden_of` returns logits, and this is the identity.

    Args:
        model: a transformers model with a language-modelling head, or a PEFT wrapper of one.
    """
    return LmHead(base_model(model)) if _can_split(model) else nn.Identity()


def hidden_of(model: nn.Module, **inputs: Tensor) -> Tensor:
    """(rows, length, width) hidden states that the model's head reads; its logits if the model cannot be split.

    Args:
        inputs: of the model: `input_ids`, optionally `position_ids` and `attention_mask`. Of an encoder-decoder also
            `decoder_input_ids`, whose hidden states are returned.
    """
    return states_of(model, (), **inputs)[0]


def states_of(model: nn.Module, taps: Collection[int], **inputs: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """What `hidden_of` returns, and the hidden states at `taps`, each (rows, length, width).

    Args:
        taps: 0 is the embeddings, i the output of block i; for decoder-only models.
        inputs: see `hidden_of`.
    """
    if taps:
        inputs["output_hidden_states"] = True
    if _can_split(model):
        output = _run_body(base_model(model), **inputs)
        hidden = output.last_hidden_state
    else:
        output = model(**inputs, use_cache=False)
        hidden = output.logits
    return hidden, tapped(model, output.hidden_states, taps) if taps else {}


def logits_of(tokens: Tensor, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function from hidden states to the logits of these tokens alone, (positions, tokens).

    Args:
        tokens: (tokens,) ids; the same in every call with a head.
        head: of a frozen model, see `head_of`.
    """
    if isinstance(head, LmHead):
        return partial(head.logits_of, tokens)
    return lambda hidden: head(hidden)[:, tokens.to(hidden.device)]


@dataclass(eq=False)
class LmHead:
    """See `head_of`.

    Args:
        model: its parts are looked up in each call, since wrappers replace them.
        parts: name of the output layer -> its rows of some tokens, kept by `logits_of`; empty if they are not enough.
    """

    model: nn.Module
    parts: dict[str, nn.Module] | None = None

    def logits_of(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """(positions, tokens) logits of some tokens, from their rows of the output layer alone where that is enough.

        That is not enough where a family treats tokens differently, so both ways are compared first.
        """
        few, own = hidden[:2], tokens.to(hidden.device)
        if self.parts is None and len(few):
            parts = _rows_of_output_layer(self.model, own)
            if parts and not close(self(few, parts), self(few)[:, own]):
                parts.clear()
            self.parts = parts
        return self(hidden, self.parts) if self.parts else self(hidden)[:, own]

    def __call__(self, hidden: Tensor, parts: Mapping[str, nn.Module] | None = None) -> Tensor:
        modules: dict[str, Any] = {**self.model._modules, **(parts or {})}
        for name in _bodies(self.model):
            modules[name] = FixedBody(hidden[None], modules[name])
        stand_in = object.__new__(type(self.model))
        stand_in.__dict__.update(self.model.__dict__, _modules=modules)
        # The class's forward: a forward set on the model (by accelerate's hooks) would run the model itself.
        return type(self.model).forward(stand_in, return_dict=True).logits[0]


def _rows_of_output_layer(model: nn.Module, tokens: Tensor) -> dict[str, nn.Module]:
    """Name -> an output layer with a copy of these rows; empty if they are all, or it is not plain and whole."""
    for name, layer in model._modules.items():
        if type(layer) is nn.Linear and layer is model.get_output_embeddings():  # type: ignore[operator]
            weight, bias = layer.weight, layer.bias
            whole = type(weight.data) is Tensor and weight.shape == (layer.out_features, layer.in_features)
            hooked = "forward" in vars(layer) or layer._forward_pre_hooks or layer._forward_hooks  # offloaded, sharded
            if whole and not weight.is_meta and not hooked and len(tokens) < layer.out_features:
                part = nn.Linear(layer.in_features, len(tokens), bias is not None, device="meta")
                part.weight = nn.Parameter(weight.detach()[tokens.to(weight.device)], requires_grad=False)
                if bias is not None:
                    part.bias = nn.Parameter(bias.detach()[tokens.to(weight.device)], requires_grad=False)
                return {name: part}
    return {}


class FixedBody:
    """Stands in for a model's body: returns the given hidden states when called; attributes are the body's."""

    def __init__(self, hidden: Tensor, body: nn.Module):
        self.output = Output(last_hidden_state=hidden)
        self.body = body
        self.decoder = self  # OPT calls this part directly

    def __call__(self, *inputs: Any, **options: Any) -> Output:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.body, name)


@dataclass
class Output(ModelOutput):
    """What bodies return. Everything but the hidden states (caches, attentions, router logits) is None."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _bodies(model: nn.Module) -> list[str]:
    """Names of the children that compute the hidden states; none if they have unusual names."""
    prefix: str = getattr(model, "base_model_prefix", "")
    if prefix in model._modules:
        return [prefix]
    stacks = ["encoder", "decoder"]  # T5
    return stacks if set(stacks) <= set(model._modules) else []


def _run_body(model: nn.Module, **inputs: Any) -> Any:
    """The body's output, as transformers' models return it."""
    bodies = [model.get_submodule(name) for name in _bodies(model)]
    if len(bodies) == 1:
        return bodies[0](**inputs, use_cache=False, return_dict=True)
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
    )


def _can_split(model: nn.Module) -> bool:
    if model not in _splits:
        sharded = any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters())
        reason = None if sharded and _bodies(base_model(model)) else _difference(model)
        if reason is not None:
            warnings.warn(
                f"{name_of(model)}: {reason}; logits of all positions are held at once, so memory grows with "
                "the length of a batch: use shorter or fewer texts per batch, or a model of another family",
                stacklevel=3,
            )
        _splits[model] = reason is None
    return _splits[model]


@torch.no_grad()
def _difference(model: nn.Module) -> str | None:
    """Tests whether body and head give the model's logits. Returns the reason if not, else None."""
    inner: Any = base_model(model)
    if not _bodies(inner):
        return "it has no part that makes the hidden states where transformers' families have it"
    inputs = probe(inner)
    with evaluating(model):
        whole = model(**inputs, use_cache=False).logits
        try:
            parts = LmHead(inner)(_run_body(inner, **inputs).last_hidden_state[0])[None]
        except Exception as error:  # any family's code may fail in its own way
            return f"its body and head cannot be run separately ({type(error).__name__}: {error})"
    return None if close(parts, whole) else "its body and head, run separately, give other logits than the model"


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether the logits are the same up to rounding."""
    tolerance = TOLERANCE.get(wanted.dtype, 0.05)
    found, wanted = found.detach().float().to(wanted.device), wanted.detach().float()
    largest = float(wanted.where(wanted.abs() < MASKED, 0).abs().max())
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, tolerance, tolerance * largest, equal_nan=True
    )


def probe(model: Any) -> dict[str, Tensor]:
    """A short input, (1, 12) tokens."""
    ids = torch.arange(1, 13, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its earlier mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
