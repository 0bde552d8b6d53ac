"""What all drafters have in common that use tensors of the target itself, and are complete only with the target."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from csdraft.heads.layers import fingerprint

__all__ = ["OnTarget", "called", "frozen", "name_only", "set_parameter", "stored_form"]

_LOCK = threading.Lock()


class OnTarget(nn.Module):
    """The stored part of a drafter that uses a target's tensors; `bind` completes it.

    Args:
        config: of the complete model, or `name_only`: reports and model cards read `name_or_path` and `vocab_size`.
        state: its tensors, by the names that they are stored under.

    Attributes:
        what, use: what it is and what it needs, for messages.
        base: the target that it was trained on, if that is known.
    """

    what, use = "drafter", "uses the target's own weights"
    base: Any = None

    def __init__(self, config: Any, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config, self.names = config, tuple(state)
        self.tensors = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in state.values())
        self._bound: weakref.WeakKeyDictionary[nn.Module, tuple[list, Any]] = weakref.WeakKeyDictionary()

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        """A copy is bound to no target: the bound models use tensors of this process."""
        return {**vars(self), "_bound": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_bound": weakref.WeakKeyDictionary()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{self._name} {self.use} and cannot run alone; pass it to generate as assistant= (in "
            "a ModelDrafter or a CascadeDrafter), or use bind(target)"
        )

    def check(self, target: Any) -> None:
        """Raises ValueError if `target` is not the model that it was trained on."""
        if self.base is not None and (found := self._fingerprint(target)) != self.base.fingerprint:
            raise ValueError(
                f"{self._name} {self._trained_on} {self.base.name}, whose weights have fingerprint "
                f"{self.base.fingerprint}; the target {called(target)} has {found}. Decode with that target, or "
                "train one for this target"
            )

    def _fingerprint(self, target: Any) -> str:
        """What is compared with the fingerprint of `base`."""
        return fingerprint(target)

    def bind(self, target: Any) -> Any:
        """The complete model, over the target's tensors.

        It is made once for each target and kept as long as both live. It is made again after the target's weights
        have moved. The target is not changed.
        """
        places = [(parameter.data_ptr(), parameter.dtype) for parameter in target.parameters()]
        with _LOCK:
            known = self._bound.get(target)
            if known is None or known[0] != places:
                self.check(target)
                self._bound[target] = known = (places, self._put_on(target))
        return known[1]

    def _put_on(self, target: Any) -> Any:
        raise NotImplementedError

    def open(self, target: Any, dtype: torch.dtype) -> Any:
        """A complete model in this dtype, for further training."""
        raise NotImplementedError

    _trained_on = "was trained on"

    @property
    def _name(self) -> str:
        return f"the {self.what} {self.config._name_or_path!r}"


def called(target: Any) -> str:
    """A target's name in messages."""
    return f"{type(target).__name__} {getattr(target.config, '_name_or_path', '')!r}"


def name_only(name: str, **more: Any) -> Any:
    """A config without sizes, for drafters whose sizes are the target's."""
    config: Any = PreTrainedConfig  # its fields are not typed
    return config(name_or_path=name, **more)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradients, over the same memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replaces a parameter of a module or of one of its parts."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, parameter)


def stored_form(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> OnTarget | None:
    """The part of a drafter that is stored, if the drafter uses a target's tensors; None for any other model.

    Args:
        model: if it is complete, its attribute `stored_by` is the class of its stored part.
        state_dict: its weights, gathered, if its own parameters are not whole.
    """
    if isinstance(model, OnTarget):
        return model
    kind = vars(model).get("stored_by")
    return None if kind is None else kind.of(model, state_dict)
