"""EAGLE-3 as a student: unrolled as in drafting, on features that the target computes in the same forward.

Training-time test (arXiv 2503.01840): step s reads the head's own output of step s - 1 and the text's tokens. A
position counts if the head can draft the next token. Distributions are compared over the draft vocabulary only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from csdraft.heads.head import HeadOptions
from csdraft.heads.kinds.eagle3 import Eagle3, Eagle3Options, default_layers
from csdraft.stored import naming
from csdraft.trainers.students._kind import HeadKind

__all__ = ["Eagle3Student"]


@dataclass(frozen=True)
class Options(HeadOptions):
    """Keys of `init.eagle3`.

    Args:
        layers: which hidden states of the target are fused, k for that after k blocks; None: 2, L/2, L - 3.
    """

    layers: tuple[int, ...] | None = None


class Eagle3Student(HeadKind):
    """See `HeadKind`. The base of all heads that fuse hidden states.

    Attributes:
        head_options: the dataclass of the head's own options.
    """

    trains, options = Eagle3, Options
    head_options: Any = Eagle3Options

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        super().check(config, options)
        asked, text = self._asked(options), config.get_text_config(decoder=True)
        count = text.num_hidden_layers
        layers = asked.layers or default_layers(count)
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= count:
            raise ValueError(
                f"init.{self.name}: layers={list(layers)} must be rising numbers from 0 to {count}, the target's"
            )
        with naming(f"init.{self.name}"):
            self.own_options(text, asked, text.vocab_size)

    def new(self, text: Any, asked: Any, draft_vocab: int) -> Any:
        return self.trains(self.layer_config(text, asked), self.own_options(text, asked, draft_vocab))

    def own_options(self, text: Any, asked: Any, draft_vocab: int) -> Any:
        """The head's own options: those of `init` that it has, and sizes."""
        known = {field.name for field in fields(self.head_options)}
        given = {key: value for key, value in vars(asked).items() if key in known}
        layers = tuple(asked.layers or default_layers(text.num_hidden_layers))
        sizes = {"layers": layers, "target_width": text.hidden_size, "draft_vocab": draft_vocab}
        return self.head_options(**given | sizes)
