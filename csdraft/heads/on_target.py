"""Drafters that use tensors of the target itself, and so wait for it: what all kinds of them have in common."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OnTarget", "called", "stored_form"]

_LOCK = threading.Lock()


class OnTarget(nn.Module):
    """What is stored of a drafter that stands on a target; `bind` completes it.

    Args:
        config: of the complete model, or one with `name_or_path` and `vocab_size`, which reports and cards ask for.
        state: its tensors, by the names that they are stored under.
    """

    what, use = "drafter", "uses the target's own weights"
    """What it is and what it needs, in messages."""

    def __init__(self, config: Any, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config, self.names = config, tuple(state)
        self.tensors = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in state.values())
        self._bound: weakref.WeakKeyDictionary[nn.Module, tuple[list, Any]] = weakref.WeakKeyDictionary()

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        """A copy is bound to no target: what is bound stands on tensors of one that lives here."""
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
        raise NotImplementedError

    def bind(self, target: Any) -> Any:
        """The complete model, over the target's tensors.

        Made once a target and kept as long as both live; made again when the target's weights have moved. Nothing of
        the target is changed.
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
        """A complete model in this dtype, to be trained further."""
        raise NotImplementedError

    @property
    def _name(self) -> str:
        return f"the {self.what} {self.config._name_or_path!r}"


def called(target: Any) -> str:
    """What messages call a target."""
    return f"{type(target).__name__} {getattr(target.config, '_name_or_path', '')!r}"


def stored_form(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> OnTarget | None:
    """What is stored of a drafter that stands on a target, bound or not; None of any other model.

    Args:
        model: if it is complete, its attribute `stored_by` is the class of what is stored.
        state_dict: its weights, gathered, if its own parameters are not whole.
    """
    if isinstance(model, OnTarget):
        return model
    kind = vars(model).get("stored_by")
    return None if kind is None else kind.of(model, state_dict)
