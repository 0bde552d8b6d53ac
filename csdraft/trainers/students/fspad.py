"""FSPAD as a student (arXiv 2408.15562): compares features before its adapter, distributions after it."""

from __future__ import annotations

from csdraft.heads.formats.own import OwnHead
from csdraft.heads.kinds.fspad import Fspad
from csdraft.trainers.students.eagle import EagleStudent

__all__ = ["FspadStudent"]


class FspadStudent(EagleStudent):
    """See `EagleStudent`. No serving engine has a layout for it, so it is stored in csdraft's own."""

    trains, stored_by = Fspad, OwnHead
