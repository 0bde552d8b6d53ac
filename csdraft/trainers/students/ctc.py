"""A CTC head as a student (arXiv 2412.00061), trained on its exact distributions of each next token.

The paper takes the CTC loss of the target's text: the logarithm of a sum over all paths. It equals the sum of the
logarithms of the tokens' conditional probabilities, from which the head drafts. Here each conditional distribution is
compared with the target's, by the recipe's losses. With the target's token instead of its distribution, and
cross-entropy, the sum is the CTC loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from csdraft.heads.kinds.ctc import Ctc, CtcOptions
from csdraft.trainers.students import parallel

__all__ = ["CtcStudent"]


@dataclass(frozen=True)
class Options(parallel.Options):
    """Keys of `init.ctc`.

    Args:
        frames: number of frames, from which `steps` tokens are drafted.
    """

    frames: int = 8


class CtcStudent(parallel.ParallelStudent):
    """See `HeadKind`."""

    trains, options, head_options = Ctc, Options, CtcOptions
