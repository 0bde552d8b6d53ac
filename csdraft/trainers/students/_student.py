"""What one kind of student says of itself. A kind is a file of this folder and is found by being there.

A kind says which options it refuses, how it is made for a target, what a training step compares, and how its stored
weights are put back; what it leaves out is as of a whole model. How a student that needs its target is stored is a
matter of `csdraft/heads`, see `stored_form`.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from csdraft.data.packing import IGNORED
from csdraft.heads.self_draft import PREFIX
from csdraft.heads.tied import borrowed
from csdraft.models import base_model
from csdraft.trainers.split import head_of, hidden_of

__all__ = ["Compared", "Counts", "Logits", "Student", "check_names", "student_of", "students"]

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


class Student:
    """One kind of student.

    Attributes:
        rate: the learning rate of a run that gives none; docs/distilling.md says where each is from.
        reads_features: whether it reads hidden states of the target, so that the target must read each text.
        needs_target: whether it is made of tensors of the target, which must be there as a whole.
        shares_target: whether the target's own layers are in it.
    """

    rate: float
    reads_features = needs_target = shares_target = False

    @property
    def name(self) -> str:
        """The file's."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        """Raises ValueError for options of which nothing can be made for a target of this config."""

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> Any:
        """A student for this target, to be trained; `check` has been called."""
        raise NotImplementedError

    def is_of(self, model: nn.Module) -> bool:
        """Whether a student in training is of this kind. If it is of none, it is a whole model."""
        return False

    # In training.

    def compared(
        self,
        student: Any,
        states: Mapping[int, Tensor],
        hidden: Tensor,
        target_logits: Logits,
        labels: Tensor,
        inputs: Any,
    ) -> Iterator[Compared | Tensor]:
        """What one step compares, part after part.

        Args:
            states: (rows, length, width) the target's hidden states by tap.
            hidden: (rows, length, width) what the target's output layer reads.
            target_logits: of `hidden`.
            labels: (rows, length) the token itself where its prediction counts, else `IGNORED`. A decoder-only model
                predicts token t after token t - 1; an encoder-decoder's labels are those of its decoder's outputs.
            inputs: `input_ids` and `position_ids`, (rows, length); of an encoder-decoder `input_ids`,
                `attention_mask` and `decoder_input_ids`.

        Yields:
            What is to be compared, or the sum over positions of another loss.
        """
        labels = labels[:, 0 if "decoder_input_ids" in inputs else 1 :]
        scored = labels != IGNORED
        own = hidden_of(student, **inputs)[:, : labels.shape[1]][scored]
        theirs = hidden[:, : labels.shape[1]][scored.to(hidden.device)]
        yield Compared(1.0, own, theirs, labels[scored], head_of(student), target_logits)

    # From disk.

    def put_back(self, student: Any, folder: str) -> None:
        """See `load_student_weights`."""
        model: Any = base_model(student)
        state, own = _read_weights(folder), model.state_dict()
        stored = {own[key].data_ptr() for key in state if key in own}
        tied = {key for key, tensor in own.items() if key not in state and tensor.data_ptr() in stored}
        tied |= borrowed(model).keys()
        check_names(state, {key: tensor for key, tensor in own.items() if key not in tied}, folder)
        model.load_state_dict(state, strict=False)  # tied weights are stored once


def check_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: str) -> None:
    """Raises ValueError unless the tensors of a folder are just those of a student."""
    other = sorted(state.keys() ^ own.keys()) or [k for k in own if state[k].shape != own[k].shape]
    if other:
        key = other[0]
        shapes = [tuple(where[key].shape) if key in where else None for where in (state, own)]
        raise ValueError(
            f"{folder} holds another student: {len(other)} tensors differ, such as {key.removeprefix(PREFIX)}, of "
            f"shape {shapes[0]} there and {shapes[1]} here; resume with the options it was trained with"
        )


def _read_weights(folder: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    index = Path(folder, "model.safetensors.index.json")
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := [name for name in sorted(files) if not Path(folder, name).is_file()]:
        raise ValueError(
            f"{folder} holds no student: it lacks {', '.join(missing)}; give a folder that a run has saved"
        )
    return {key: tensor for name in sorted(files) for key, tensor in load_file(Path(folder, name)).items()}


@cache
def students() -> dict[str, Student]:
    """The kinds of students, by the names of their files."""
    found = {}
    for module in pkgutil.iter_modules([os.path.dirname(__file__)]):
        if not module.name.startswith("_"):
            made = importlib.import_module(f"{__package__}.{module.name}")
            found[module.name] = getattr(made, made.__all__[0])()
    return found


def student_of(model: Any) -> Student:
    """The kind of a student in training."""
    return next((kind for kind in students().values() if kind.is_of(base_model(model))), students()["whole"])
