"""A DFlash head as a student (arXiv 2602.06036): a block after every token of the text is compared with the target.

The paper trains on a random sample of a text's tokens, csdraft on all. The paper weighs token j of a block by
exp(-(j - 1) / gamma), with gamma = 4 for blocks of 8. Here `decay` is the factor from one token to the next, 0.8 by
default.
"""

from __future__ import annotations

from typing import Any

from csdraft.heads.kinds.dflash import Dflash, DflashOptions
from csdraft.trainers.students import parallel

__all__ = ["DflashStudent"]


class DflashStudent(parallel.ParallelStudent):
    """See `HeadKind`; its options are those of a parallel head."""

    trains, head_options = Dflash, DflashOptions

    def check(self, config: Any, options: Any) -> None:
        super().check(config, options)
        if 0 in (layers := self._asked(options).layers or ()):
            raise ValueError(
                f"init.{self.name}: layers={list(layers)}; its layout cannot name the embeddings, 0: begin at 1"
            )
