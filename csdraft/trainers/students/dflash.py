"""A DFlash head as a student (arXiv 2602.06036): a block behind every token of the text, compared with the target.

The paper trains on some of a text's tokens, drawn at random; csdraft on all. It weighs tokens of a block by
exp(-(j - 1) / gamma), with gamma = 4 for blocks of 8: here `decay` is that factor, 0.8 unless said.
"""

from __future__ import annotations

from typing import Any

from csdraft.heads.formats.dflash import DflashHead
from csdraft.heads.kinds.dflash import Dflash, DflashOptions
from csdraft.trainers.students import parallel

__all__ = ["DflashStudent"]


class DflashStudent(parallel.ParallelStudent):
    """See `HeadKind`; its options are those of a parallel head."""

    trains, stored_by, head_options = Dflash, DflashHead, DflashOptions

    def check(self, config: Any, options: Any) -> None:
        super().check(config, options)
        if 0 in (layers := self._asked(options).layers or ()):
            raise ValueError(
                f"init.{self.name}: layers={list(layers)}; its layout cannot name the embeddings, 0: begin at 1"
            )
