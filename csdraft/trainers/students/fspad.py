"""FSPAD as a student (arXiv 2408.15562): the feature is compared before its adapter, the distribution behind it."""

from __future__ import annotations

from csdraft.heads.formats.own import OwnHead
from csdraft.heads.kinds.fspad import Fspad
from csdraft.trainers.students.eagle import EagleStudent

__all__ = ["FspadStudent"]


class FspadStudent(EagleStudent):
    """See `EagleStudent`; no engine knows its layout, so it is stored in csdraft's own."""

    trains, stored_by = Fspad, OwnHead
