"""From a text and its draft to what one row reads, and which nodes of an old draft a new one has again."""

from __future__ import annotations

from collections.abc import Sequence

from csdraft.decoding.awaited import Awaited
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.inputs import Plan
from csdraft.decoding.text import Text

__all__ = ["again_in", "plan_of"]


def plan_of(text: Text, draft: Draft, first: int, nodes: Sequence[int]) -> Plan:
    """Reads `text` from position `first` on, then these nodes of `draft`, which follows it."""
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
    paths: list[tuple[int, ...]] = [()] * (length - first)
    for node in range(len(draft)):  # parents come first
        seen[node] = (*seen[draft.parents[node]], length + node)
    paths += [seen[node] for node in nodes]
    return Plan(tokens, positions, slots, sees, paths, spare, length)


def again_in(old: Draft, draft: Draft, tip: int) -> dict[int, int]:
    """Node of `draft` -> the node below `tip` of the old draft that is the same."""
    again: dict[int, int] = {}
    taken = set()  # siblings may carry the same token: only one of them can have its twin's slot
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        above = tip if parent == ROOT else again.get(parent)
        twin = None if above is None else old.child(above, token)
        if twin is not None and twin not in taken:
            again[node] = twin
            taken.add(twin)
    return again
