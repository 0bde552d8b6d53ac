"""HASS as a student (arXiv 2408.15766): EAGLE-1's losses at each unrolled step."""

from __future__ import annotations

from csdraft.heads.kinds.hass import Hass
from csdraft.trainers.students.eagle import EagleStudent

__all__ = ["HassStudent"]


class HassStudent(EagleStudent):
    """See `EagleStudent`."""

    trains = Hass
