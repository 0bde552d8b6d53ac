"""The interface of a kind of student. Every file of this folder is a kind, and so is every head without a file here.

A kind defines which options it refuses, how it is made for a target, what a training step compares, and how its stored
weights are loaded again. The defaults are those of a whole model. `csdraft/heads` stores students that need their
target, see `stored_form`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from csdraft.data.packing import IGNORED
from csdraft.heads.folder import read_tensors
from csdraft.heads.self_draft import PREFIX
from csdraft.heads.tied import borrowed
from csdraft.models import base_model
from csdraft.trainers.split import head_of, hidden_of

__all__ = ["Compared", "Counts", "Logits", "Student", "check_names"]

Logits = Callable[[Tensor], Tensor]
"""From hidden states, (positions, width), to logits, (positions, vocab)."""
Counts = Callable[[], Tensor]
"""Returns (vocab,) how often each token is a label in the training text."""


class Compared(NamedTuple):
    """One part of a training step: the arguments of `Objective.total`, and the part's weight.

    Attributes:
        weight: of the sum of its losses.
        student, target: (positions, width) hidden states of both models.
        labels: (positions,) the next token at each, as an index into the logits.
        student_logits, target_logits: compute logits of the same tokens.
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
        rate: default learning rate; docs/distilling.md says where each is from.
        reads_features: whether it reads hidden states of the target, so that the target must read each text.
        needs_target: whether it is made from tensors of the target, which must be whole.
        shares_target: whether it contains the target's own layers.
    """

    rate: float
    reads_features = needs_target = shares_target = False

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        """Raises ValueError if these options cannot make a student for a target with this config."""

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> Any:
        """A student for this target, ready to train. Call `check` first."""
        raise NotImplementedError

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
        """What one training step compares.

        Args:
            states: tap -> the target's hidden states there, (rows, length, width).
            hidden: (rows, length, width) the input of the target's output layer.
            target_logits: computes the target's logits from `hidden`.
            labels: (rows, length) token ids where the prediction counts, else `IGNORED`. A decoder-only model
                predicts token t at position t - 1, an encoder-decoder at position t.
            inputs: `input_ids` and `position_ids`, (rows, length); for an encoder-decoder `input_ids`,
                `attention_mask` and `decoder_input_ids`.

        Yields:
            Parts to compare, or sums over positions of other losses.
        """
        labels = labels[:, 0 if "decoder_input_ids" in inputs else 1 :]
        scored = labels != IGNORED  # (rows, length or length - 1)
        own = hidden_of(student, **inputs)[:, : labels.shape[1]][scored]  # (positions, width)
        theirs = hidden[:, : labels.shape[1]][scored.to(hidden.device)]
        yield Compared(1.0, own, theirs, labels[scored], head_of(student), target_logits)

    # From disk.

    def load_weights(self, student: Any, folder: str) -> None:
        """Loads stored weights; see `load_student_weights`."""
        model: Any = base_model(student)
        state, own = read_tensors(folder), model.state_dict()
        stored = {own[key].data_ptr() for key in state if key in own}
        tied = {key for key, tensor in own.items() if key not in state and tensor.data_ptr() in stored}
        tied |= borrowed(model).keys()
        check_names(state, {key: tensor for key, tensor in own.items() if key not in tied}, folder)
        model.load_state_dict(state, strict=False)  # tied weights are stored once


def check_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: str) -> None:
    """Raises ValueError unless a folder's tensors have the names and shapes of a student's own."""
    other = sorted(state.keys() ^ own.keys()) or [k for k in own if state[k].shape != own[k].shape]
    if other:
        key = other[0]
        shapes = [tuple(where[key].shape) if key in where else None for where in (state, own)]
        raise ValueError(
            f"{folder} holds another student: {len(other)} tensors differ, such as {key.removeprefix(PREFIX)}, of "
            f"shape {shapes[0]} there and {shapes[1]} here; resume with the options it was trained with"
        )
