"""What one kind of drafting head says of its training. A kind is a file of this folder, asked for by name in `init`.

A kind says what its options are, how a head is made from a target, and what a training step compares. How a head is
stored is a matter of `csdraft/heads` (`StoredHead`), and how it drafts of its session: a new kind edits no file here.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from csdraft.decoding.feature_session import FeatureModel
from csdraft.models import base_model

__all__ = ["Compared", "Counts", "HeadKind", "asked_kind", "kind_of_head"]

Logits = Callable[[Tensor], Tensor]
Counts = Callable[[], Tensor]
"""Gives (vocab,) how often each token is to be predicted in the training text."""


class Compared(NamedTuple):
    """One part of a training step: what `Objective.total` compares, and its weight.

    Attributes:
        weight: of the sum of its losses.
        student, target: (positions, width) hidden states of the two.
        labels: (positions,) the next token at each, as the two functions number tokens.
        student_logits, target_logits: from hidden states to logits of the same tokens.
    """

    weight: float
    student: Tensor
    target: Tensor
    labels: Tensor
    student_logits: Logits
    target_logits: Logits


class HeadKind:
    """One kind of drafting head, as the trainer sees it.

    Attributes:
        trains: the class of the heads that it makes.
    """

    trains: type[nn.Module]

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        """Raises ValueError for options that no head for a target of this config can have."""
        raise NotImplementedError

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        """A new head for a target, to be trained, in float32."""
        raise NotImplementedError

    def compared(
        self,
        head: Any,
        states: Mapping[int, Tensor],
        hidden: Tensor,
        target_logits: Logits,
        labels: Tensor,
        inputs: Any,
    ) -> Iterator[Compared]:
        """What one step compares, drafting step after drafting step.

        Args:
            head: the student.
            states: (rows, length, width) the target's hidden states by tap.
            hidden: (rows, length, width) what the target's output layer reads.
            target_logits: of `hidden`.
            labels: (rows, length) the token itself where its prediction counts, else `IGNORED`.
            inputs: `input_ids` and `position_ids`, (rows, length).
        """
        raise NotImplementedError


@cache
def kinds() -> dict[str, HeadKind]:
    """The kinds of heads, by the names of their files."""
    found = {}
    for module in pkgutil.iter_modules([os.path.dirname(__file__)]):
        if not module.name.startswith("_"):
            made = importlib.import_module(f"{__package__}.{module.name}")
            found[module.name] = getattr(made, made.__all__[0])()
    return found


def asked_kind(init: Mapping[str, Any] | None) -> tuple[HeadKind, Mapping[str, Any]] | None:
    """The kind that `init` asks for, and its options; None if it asks for a model."""
    for name in init or ():
        if name in kinds():
            return kinds()[name], init[name] or {}  # type: ignore[index]
    return None


def kind_of_head(student: Any) -> HeadKind | None:
    """The kind of a head that is trained; None of a model."""
    model = base_model(student)
    if not isinstance(model, FeatureModel):
        return None
    return next(kind for kind in kinds().values() if isinstance(model, kind.trains))
