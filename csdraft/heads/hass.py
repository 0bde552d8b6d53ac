"""HASS (arXiv 2408.15766): EAGLE-1's module, trained on what it will read when it drafts.

EAGLE-1 trains each entry on the target's features, while in a draft all but the first are the head's own. HASS trains
several steps (harmonised context): step s reads, at the last s entries, the features that the head computed at the
steps before, and the target's at all earlier ones. No gradient flows through these features. Its second part is a loss
on the target's most probable tokens, `csdraft/losses/top_k.py`, which a recipe asks for beside another loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from csdraft.heads.eagle import Eagle, EagleOptions

__all__ = ["Hass", "HassOptions"]


@dataclass(frozen=True)
class HassOptions(EagleOptions):
    """Keys of `init.hass`: those of `EagleOptions`; all steps count the same, as in the original code."""

    steps: int = 3
    decay: float = 1.0


class Hass(Eagle):
    """An EAGLE-1 head that training unrolls."""

    Options = HassOptions
    detached = True
