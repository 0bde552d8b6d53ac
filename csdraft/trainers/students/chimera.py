"""Chimera as a student (arXiv 2402.15758): unrolled as in drafting; each drafted token has its own output layer."""

from __future__ import annotations

from csdraft.heads.kinds.chimera import Chimera
from csdraft.trainers.students._kind import HeadKind

__all__ = ["ChimeraStudent"]


class ChimeraStudent(HeadKind):
    """See `HeadKind`."""

    trains = Chimera
