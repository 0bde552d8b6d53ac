"""Makes the plan of one row from its text and draft, and finds the nodes that an old and a new draft share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csdraft.decoding.awaited import Awaited
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.inputs import Plan
from csdraft.decoding.text import Text

__all__ = ["Reading", "plan_of", "shared_nodes"]


@dataclass
class Reading:
    """What the cache holds for one row: the first `read` tokens of its text, then the nodes of a draft.

    Slot s holds the text's token at position s; slot `read` + n holds node n of the draft.
    """

    text: Text | None = None
    read: int = 0
    draft: Draft = Draft()
    long: bool = False  # whether its first token was read with the rotary factors for long texts

    @property
    def used(self) -> int:
        """Slots in use."""
        return self.read + len(self.draft)


def plan_of(text: Text, draft: Draft, first: int, nodes: Sequence[int]) -> Plan:
    """A plan that reads `text` from position `first` on, then `nodes` of the draft after it."""
    length = len(text)
    drafted = draft.tokens
    awaited = drafted if isinstance(drafted, Awaited) and drafted.waiting and len(nodes) == len(drafted) else None
    tokens = text.tokens[first:] + ([drafted[node] for node in nodes] if awaited is None else [0] * len(nodes))
    slots = [*range(first, length), *(length + node for node in nodes)]
    spare = length + len(draft)
    if draft.is_chain:
        return Plan(tokens, slots, slots, [slot + 1 for slot in slots], None, spare, length, awaited)
    positions = [*range(first, length), *(length + draft.depths[node] for node in nodes)]
    sees = [*range(first + 1, length + 1), *(length for _ in nodes)]
    seen: dict[int, tuple[int, ...]] = {ROOT: ()}
    paths: list[tuple[int, ...]] = [()] * (length - first)  # (queries,) text tokens have no extra slots
    for node in range(len(draft)):  # parents come first
        seen[node] = (*seen[draft.parents[node]], length + node)
    paths += [seen[node] for node in nodes]
    return Plan(tokens, positions, slots, sees, paths, spare, length)


def shared_nodes(old: Draft, draft: Draft, tip: int) -> dict[int, int]:
    """Node of `draft` -> the same node below `tip` in the old draft."""
    shared: dict[int, int] = {}
    taken = set()  # siblings may have the same token, but each old node can be used only once
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        above = tip if parent == ROOT else shared.get(parent)
        twin = None if above is None else old.child(above, token)
        if twin is not None and twin not in taken:
            shared[node] = twin
            taken.add(twin)
    return shared
