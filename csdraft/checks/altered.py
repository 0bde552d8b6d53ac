"""What was changed on a model since it was made: hooks, forwards put in place, modules of another kind.

What is known of a class says nothing of such a model. What libraries put there to place, cast or capture (accelerate,
transformers, torch) leaves what a model computes as it is, and does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from functools import cache, partial
from typing import Any

from torch import nn
from torch.nn.modules import module as shared

__all__ = ["alterations", "described"]

HARMLESS = {"accelerate", "torch", "transformers"}
"""Packages whose hooks, and whose forwards around a model's own, do not count."""
LAYERS = {
    *(nn.Linear, nn.Identity, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout),
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict),
    *(nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh, nn.Sigmoid),
}
"""Modules of torch that treat each position by itself."""
ELSEWHERE = ("transformers.activations", "transformers.pytorch_utils", "peft.")
"""Where other modules of a stock model come from, besides its own family."""
INNER = ("_old_forward", "_original_forward")
"""What accelerate calls the forward that it has put its own around."""
OF_CLASS = "a module of class "

Alteration = tuple[str, nn.Module, Hashable]
"""What it is, where, and a key that no other alteration of this process has."""


def alterations(model: nn.Module) -> list[Alteration]:
    """Everything changed, but for the class of the model itself and an encoder, which runs once either way.

    About a microsecond a module. The keys keep nothing alive.
    """
    families = frozenset(_package(made) for made in type(model).__mro__)
    everywhere = shared._global_forward_hooks, shared._global_forward_pre_hooks
    found: list[Alteration] = [("a forward hook on all modules", model, tuple(hooks)) for hooks in everywhere if hooks]
    stack: list[nn.Module | None] = [model]
    config: Any = model.config
    seen = {model.get_encoder()} if config.is_encoder_decoder else set()  # type: ignore[operator]
    while stack:
        if (module := stack.pop()) is None or module in seen:
            continue
        seen.add(module)
        own, made = vars(module), type(module)
        stack += own["_modules"].values()
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            found += _hooks(module)
        if "forward" in own and (forward := _innermost(module, own["forward"])) is not None:
            found.append(("a forward of its own", module, _reference(forward)))
        if module is not model and not _is_stock(made, families):
            found.append((OF_CLASS + made.__name__, module, _reference(module)))
        if not _is_own(made, made.forward):
            found.append((f"another forward of class {made.__name__}", module, _reference(made.forward)))
    return found


def _hooks(module: nn.Module) -> list[Alteration]:
    """Its handles are numbered through, and no number comes twice in a process."""
    hooks = (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks))
    return [
        (f"a forward {what}", module, handle)
        for what, by_handle in hooks
        for handle, hook in by_handle.items()
        if _root(hook) not in HARMLESS
    ]


def described(model: nn.Module) -> str:
    """Where it has been changed, for a message, such as 'a forward hook on model.layers.0.mlp'; empty if nowhere.

    Without the parts that its own class may have brought along, such as the Llama of a vision-language model.
    """
    names = {module: name for name, module in model.named_modules()}
    made = [
        f"{what} on {names[module] or type(module).__name__}"
        for what, module, _ in alterations(model)
        if not what.startswith(OF_CLASS) or type(module).__module__.partition(".")[0] not in HARMLESS
    ]
    return ", ".join(made[:3]) + (", ..." if len(made) > 3 else "")


def _innermost(module: nn.Module, forward: Any) -> Any:
    """The forward that a library's one is put around; None if that is what the class has."""
    while forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        if _root(forward) not in HARMLESS:
            return forward
        forward = next((vars(module)[name] for name in INNER if vars(module).get(name) not in (None, forward)), None)
    return None


def _root(function: Any) -> str:
    """The package in whose code a function, method, partial or callable object is written, whatever it wraps."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    written = getattr(function, "__globals__", None)
    place = type(function).__module__ if written is None else written.get("__name__", "")
    return place.partition(".")[0]


@cache
def _package(made: type) -> str:
    return made.__module__.rpartition(".")[0]


@cache
def _is_stock(made: type, families: frozenset[str]) -> bool:
    if made in LAYERS or made.__module__.startswith(ELSEWHERE):
        return True
    return made.__module__.startswith("transformers.models.") and _package(made) in families


@cache
def _is_own(made: type, forward: Any) -> bool:
    """Whether the forward of a class is written where the class, or one that it inherits from, is."""
    return _root(forward) in {above.__module__.partition(".")[0] for above in made.__mro__}


def _reference(something: Any) -> Hashable:
    """As good a key as the object itself, without holding it."""
    try:
        return weakref.ref(something)
    except TypeError:  # of a class with slots
        return id(something)
