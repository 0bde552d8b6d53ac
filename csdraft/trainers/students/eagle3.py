"""EAGLE-3 as a student: unrolled as it drafts, on features that the target computes in the same pass.

Training-time test (arXiv 2503.01840): step s reads what the head itself computed at step s - 1, and the text's own
tokens. A position counts where the next token is one that the head can draft; both distributions are then compared
over the draft vocabulary alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from csdraft.heads.eagle3 import Eagle3, Eagle3Options, default_layers
from csdraft.heads.eagle3_files import Eagle3Head
from csdraft.heads.head import HeadOptions
from csdraft.trainers.students._kind import HeadKind

__all__ = ["Eagle3Student"]


@dataclass(frozen=True)
class Options(HeadOptions):
    """Keys of `init.eagle3`.

    Args:
        layers: hidden states of the target that are fused, k for the one after k blocks; None: 2, L/2, L - 3.
    """

    layers: tuple[int, ...] | None = None


class Eagle3Student(HeadKind):
    """See `HeadKind`."""

    trains, options, stored_by = Eagle3, Options, Eagle3Head

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        super().check(config, options)
        count = config.get_text_config(decoder=True).num_hidden_layers
        layers = self._asked(options).layers or default_layers(count)
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= count:
            raise ValueError(
                f"init.{self.name}: layers={list(layers)} must be rising numbers from 0 to {count}, the target's"
            )

    def new(self, text: Any, asked: Any, draft_vocab: int) -> Eagle3:
        layers = tuple(asked.layers or default_layers(text.num_hidden_layers))
        options = Eagle3Options(layers, text.hidden_size, draft_vocab)
        return Eagle3(self.layer_config(text, asked), options, asked.steps, asked.decay)

    def unrolling(self, head: Any) -> tuple[int, float]:
        return head.steps, head.decay
