"""Recurrent Drafter as a student (arXiv 2403.09919): its cell runs along the text's own tokens."""

from __future__ import annotations

from csdraft.heads.kinds.redrafter import Redrafter
from csdraft.trainers.students._kind import HeadKind

__all__ = ["RedrafterStudent"]


class RedrafterStudent(HeadKind):
    """See `HeadKind`."""

    trains = Redrafter
