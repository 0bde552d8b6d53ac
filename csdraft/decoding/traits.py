"""Finds out how a model handles masks, positions and its cache, where decoding with drafts depends on it.

Config fields alone are not enough: `sliding_window` does nothing if the model's code never makes such a mask. So this
file inspects the source code: which masks the decoder makes, and which arguments its functions take.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from csdraft.decoding.cache import windows_of_cache
from csdraft.decoding.cache_names import GENERATE_CACHE, cache_of_forward, forward_takes

__all__ = ["Span", "Switch", "Traits", "decoder_of", "tapped", "traits_of", "unwrapped"]

MAKES_MASKS = re.compile(r"create_\w*mask")
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True)
class Span:
    """How far back a query sees in one kind of layer.

    Attributes:
        window: it sees this many tokens, itself included; None: all.
        chunk: the text is split into chunks of this many tokens, and it sees only its own chunk; None: all.
    """

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Switch:
    """A text length at which a model's rotary factors change, for all positions of a forward at once.

    Attributes:
        length: the longest text that is read with the factors for short texts.
        rereads: whether plain `generate` drops its cache after that length and reads the whole text again.
        every_token: whether each longer length has different factors (dynamic NTK).
    """

    length: int
    rereads: bool = False
    every_token: bool = False


@dataclass(frozen=True)
class Traits:
    """What decoding with drafts needs to know about one model.

    Attributes:
        cache_name: name of the forward's argument for the KV cache.
        keeps_logits: whether the forward takes `logits_to_keep`.
        additive: whether attention adds its mask to the scores (eager) instead of taking True and False.
        spans: key in the dict of masks that the forward takes -> how far a query sees with that mask; the only key is
            None if the forward takes a single mask.
        cache_windows: how many of the last tokens plain `generate`'s cache keeps in a layer, if the config has windows
            that the model's masks ignore. They limit what tokens after the prompt see. Empty if the cache keeps all.
        positions: how many position embeddings it has; None: no limit (rotary and relative positions).
        switch: where its rotary factors change; None: nowhere.
    """

    cache_name: str
    keeps_logits: bool
    additive: bool
    spans: Mapping[str | None, Span]
    cache_windows: frozenset[int | None]
    positions: int | None
    switch: Switch | None

    @cached_property
    def sees_all(self) -> bool:
        """Whether every layer sees all earlier tokens."""
        return not self.cache_windows and all(span == Span() for span in self.spans.values())

    @property
    def reusable(self) -> bool:
        """Whether another call can use the same cache. It cannot if the cache depends on the prompt's length."""
        return self.switch is None and not self.cache_windows

    @property
    def longest_span(self) -> int:
        """The largest window or chunk; 0 if there is none."""
        return max((span.window or span.chunk or 0 for span in self.spans.values()), default=0)


def traits_of(model: nn.Module) -> Traits:
    """The traits of a causal LM, a vision-language model with text alone, or a T5-like model."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    code = _code_of(type(decoder_of(model)))
    rotary = code.rotary or config.is_encoder_decoder
    return Traits(
        cache_of_forward(model) or GENERATE_CACHE,
        forward_takes(model, "logits_to_keep"),
        text._attn_implementation == "eager",
        _spans(text, code),
        _cache_windows(text, code),
        None if rotary else getattr(text, "max_position_embeddings", None),
        _switch(model, text) if code.rotary else None,
    )


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that makes the masks: the innermost module around the token embedding with mask code."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is embedding)
    parts = name.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
    return next((module for module in around if MAKES_MASKS.search(_source(type(module)))), around[0])


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` or data parallelism."""
    while True:
        if "_orig_mod" in model._modules:  # torch.compile's wrapper; importing its class is slow
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@dataclass(frozen=True)
class Code:
    """What a decoder's code does: which masks it makes, whether it takes several masks, whether it has rotary code."""

    windows: bool
    chunks: bool
    several: bool
    rotary: bool


def _written(made: type) -> list[type]:
    """A class and those of its bases that are the model's own: a user may have derived it from a family's."""
    return [base for base in made.__mro__ if issubclass(base, nn.Module) and base not in (nn.Module, PreTrainedModel)]


@cache
def _source(made: type) -> str:
    """The source code of a class and its bases; nothing of those that were made at run time."""
    found = []
    for base in _written(made):
        with suppress(OSError, TypeError):
            found.append(inspect.getsource(base))
    return "\n".join(found)


@cache
def _code_of(decoder: type) -> Code:
    source = _source(decoder)
    modules = {base.__module__ for base in _written(decoder)} & sys.modules.keys()
    names = {name for module in modules for name in vars(sys.modules[module])}
    return Code(
        "sliding_window_causal_mask" in source or "masks_for_generate" in source,
        "chunked_causal_mask" in source,
        re.search(r"isinstance\([^()]*mask[^()]*, dict\)", source) is not None,
        any("Rotary" in name for name in names),
    )


def _spans(text: Any, code: Code) -> dict[str | None, Span]:
    window = getattr(text, "sliding_window", None) if code.windows else None
    chunk = getattr(text, "attention_chunk_size", None) if code.chunks else None
    known = {FULL: Span(), SLIDING: Span(window=window), CHUNKED: Span(chunk=chunk)}
    kinds = set(getattr(text, "layer_types", None) or ()) & known.keys()
    if code.several and kinds - {FULL}:
        return {kind: known[kind] for kind in sorted(kinds | {FULL})}
    if code.several and kinds:  # only full attention layers: one mask is enough
        return {None: Span()}
    return {None: Span(window=window)}


def _cache_windows(text: Any, code: Code) -> frozenset[int | None]:
    fields = ("sliding_window", "attention_chunk_size", "layer_types")
    if code.windows or code.chunks or all(getattr(text, name, None) is None for name in fields):
        return frozenset()
    windows = windows_of_cache(text)
    return frozenset() if windows == {None} else frozenset(windows)


def _switch(model: nn.Module, text: Any) -> Switch | None:
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" not in parameters:  # one set of parameters for each kind of layer
        parameters = next((p for p in parameters.values() if isinstance(p, Mapping) and _changes(p)), {})
    if not _changes(parameters):
        return None
    if parameters["rope_type"] == "longrope":
        preparing = inspect.getsource(type(model).prepare_inputs_for_generation)  # type: ignore[attr-defined]
        length = parameters.get("original_max_position_embeddings") or text.original_max_position_embeddings
        return Switch(length, rereads="original_max_position_embeddings" in preparing)
    return Switch(text.max_position_embeddings, every_token=True)


def _changes(parameters: Mapping[str, Any]) -> bool:
    kind = parameters.get("rope_type", "default")
    return kind == "longrope" or "dynamic" in kind


def tapped(model: Any, states: Sequence[Tensor], taps: Iterable[int]) -> dict[int, Tensor]:
    """By tap, (rows, queries, width) of the hidden states that a forward of a model has returned.

    Raises:
        ValueError: the model has several hidden states for each token.
    """
    found = {tap: states[tap] for tap in taps}
    if wrong := [tap for tap, state in found.items() if state.dim() != 3]:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) has several hidden states for each token, of shape "
            f"{tuple(states[wrong[0]].shape)}, and a head reads one; draft with another model"
        )
    return found
