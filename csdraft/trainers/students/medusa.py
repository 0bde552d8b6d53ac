"""Medusa-1 as a student (arXiv 2401.10774): each head is compared at its own distance, from the same hidden state."""

from __future__ import annotations

from csdraft.heads.formats.medusa import MedusaHead
from csdraft.heads.kinds.medusa import Medusa
from csdraft.trainers.students._kind import HeadKind

__all__ = ["MedusaStudent"]


class MedusaStudent(HeadKind):
    """See `HeadKind`."""

    trains, stored_by = Medusa, MedusaHead
