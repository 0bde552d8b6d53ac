"""Finds what was changed on a model after it was made: hooks, replaced forwards, modules of other classes.

What csdraft knows about a class may not hold for a changed model. Changes by accelerate, transformers and torch, such
as hooks that move tensors between devices, do not count: they do not change the results.
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
"""Packages whose hooks and wrapped forwards do not count."""
LAYERS = {
    *(nn.Linear, nn.Identity, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout),
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict),
    *(nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh, nn.Sigmoid),
}
"""Modules of torch that compute each position separately."""
ELSEWHERE = ("transformers.activations", "transformers.pytorch_utils", "peft.")
"""Python modules whose classes an unchanged model may use besides those of its own family."""
INNER = ("_old_forward", "_original_forward")
"""Attributes in which accelerate keeps the forward that it wraps."""
OF_CLASS = "a module of class "

Alteration = tuple[str, nn.Module, Hashable]
"""A change: a description, the module, and a key that no other change in this process has."""


def alterations(model: nn.Module) -> list[Alteration]:
    """All changes below the model's own class, except in an encoder, which runs once with or without drafts.

    It takes about a microsecond per module. The keys keep no object alive.
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
    """The module's own hooks. As keys they have torch's handle ids, which are unique in a process."""
    hooks = (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks))
    return [
        (f"a forward {what}", module, handle)
        for what, by_handle in hooks
        for handle, hook in by_handle.items()
        if _root(hook) not in HARMLESS
    ]


def described(model: nn.Module) -> str:
    """The changes for a message, such as 'a forward hook on model.layers.0.mlp'; empty if there are none.

    Modules from HARMLESS packages are left out, since the model's class may have made them: the Llama in a
    vision-language model.
    """
    names = {module: name for name, module in model.named_modules()}
    changes = [
        f"{what} on {names[module] or type(module).__name__}"
        for what, module, _ in alterations(model)
        if not what.startswith(OF_CLASS) or type(module).__module__.partition(".")[0] not in HARMLESS
    ]
    return ", ".join(changes[:3]) + (", ..." if len(changes) > 3 else "")


def _innermost(module: nn.Module, forward: Any) -> Any:
    """The forward inside those that HARMLESS packages wrap around it; None if it is the class's own."""
    while forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        if _root(forward) not in HARMLESS:
            return forward
        forward = next((vars(module)[name] for name in INNER if vars(module).get(name) not in (None, forward)), None)
    return None


def _root(function: Any) -> str:
    """The package that contains the code of a function, method, partial or callable object."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    namespace = getattr(function, "__globals__", None)
    module = type(function).__module__ if namespace is None else namespace.get("__name__", "")
    return module.partition(".")[0]


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
    """Whether a class's forward comes from the package of the class or of one that it inherits from."""
    return _root(forward) in {above.__module__.partition(".")[0] for above in made.__mro__}


def _reference(something: Any) -> Hashable:
    """A key for an object that does not keep it alive."""
    try:
        return weakref.ref(something)
    except TypeError:  # its class has slots
        return id(something)
