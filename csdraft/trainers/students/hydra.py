"""Hydra as a student (arXiv 2402.05109): unrolled over the text's own tokens, each head compared at its own distance."""

from __future__ import annotations

from csdraft.heads.hydra import Hydra
from csdraft.trainers.students._kind import HeadKind

__all__ = ["HydraStudent"]


class HydraStudent(HeadKind):
    """See `HeadKind`."""

    trains = Hydra
