"""A CTC head as a student (arXiv 2412.00061), trained by its exact distributions of each next token.

The paper takes the CTC loss of what the target writes: the logarithm of the sum over all paths. That of a text's
beginning is the sum of the logarithms of its tokens' conditional probabilities, and from those the head drafts. So
each is compared with the target's distribution, by whatever losses a recipe names. With one token in the place of
that distribution, the sum would be the CTC loss of a beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from csdraft.heads.formats.own import OwnHead
from csdraft.heads.kinds.ctc import Ctc, CtcOptions
from csdraft.trainers.students import parallel

__all__ = ["CtcStudent"]


@dataclass(frozen=True)
class Options(parallel.Options):
    """Keys of `init.ctc`.

    Args:
        frames: how many there are; from them `steps` tokens are drafted.
    """

    frames: int = 8


class CtcStudent(parallel.ParallelStudent):
    """See `HeadKind`."""

    trains, options, stored_by, head_options = Ctc, Options, OwnHead, CtcOptions

    def check(self, config: Any, options: Any) -> None:
        super().check(config, options)
        asked = self._asked(options)
        if asked.frames < asked.steps:
            raise ValueError(
                f"init.{self.name}: frames={asked.frames}; {asked.steps} tokens (steps) take as many frames or more"
            )

    def more(self, text: Any, asked: Any) -> dict[str, Any]:
        return super().more(text, asked) | {"frames": asked.frames}
