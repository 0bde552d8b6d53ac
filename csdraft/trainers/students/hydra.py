"""Hydra as a student (arXiv 2402.05109): each head reads the text's own tokens, up to its distance."""

from __future__ import annotations

from csdraft.heads.kinds.hydra import Hydra
from csdraft.trainers.students._kind import HeadKind

__all__ = ["HydraStudent"]


class HydraStudent(HeadKind):
    """See `HeadKind`."""

    trains = Hydra
