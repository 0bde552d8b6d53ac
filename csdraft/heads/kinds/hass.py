"""HASS (arXiv 2408.15766): EAGLE-1's module, trained on the features that it reads in a draft.

EAGLE-1 trains each entry on the target's features, but in a draft all features except the first are the head's own.
HASS trains several steps (harmonised context). Step s reads features that the head computed in earlier steps at the
last s entries, and the target's at all others. No gradient flows through the head's features. Its second part is a
loss on the target's most probable tokens, `csdraft/losses/top_k.py`, which a recipe adds to another loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from csdraft.heads.kinds.eagle import Eagle, EagleOptions

__all__ = ["Hass", "HassOptions"]


@dataclass(frozen=True)
class HassOptions(EagleOptions):
    """Keys of `init.hass`: those of `EagleOptions`. All steps have the same weight, as in the original code."""

    steps: int = 3
    decay: float = 1.0


class Hass(Eagle):
    """An EAGLE-1 head whose training unrolls several steps."""

    Options = HassOptions
    detached = True
