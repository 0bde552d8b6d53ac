"""A corpus of token ids that is searched for the last tokens of a text: a memory-mapped suffix array.

For retrieval-based drafting (REST, arXiv 2311.08252). The corpus is stored backwards, and its positions are sorted by
the tokens that come before them. So one binary search finds the longest match.
"""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from csdraft.tables._file import read_arrays, write_arrays

__all__ = ["CorpusIndex"]

FORMAT = "csdraft-corpus-1"
JUNCTION = -1
SPAN = 16
"""Positions are sorted by this many tokens, so no match is longer."""


class CorpusIndex:
    """An index that never changes, so threads may share it. Only those pages of a file are loaded that are read.

    Args:
        backwards: (tokens,) int32 the documents, last token first; in reading order each document ends with a -1.
        order: (places,) int32 the places in `backwards` of tokens that another token follows in their document, sorted
            by the `SPAN` tokens from there on.
        largest: the largest token id.
        path: the file that both arrays are mapped from, if any.
    """

    def __init__(self, backwards: memoryview, order: memoryview, largest: int, path: Path | None = None):
        self._tokens, self._order, self.largest, self.path = backwards, order, largest, path

    def __len__(self) -> int:
        """Tokens, plus one for the end of each document."""
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        return self._tokens.nbytes + self._order.nbytes

    def find(self, tail: Sequence[int], least: int) -> tuple[int, int, int]:
        """Finds the longest ending of `tail` that the corpus continues: (length, first and last of its places).

        Args:
            tail: a text's last tokens; only the last `SPAN` are used.
            least: the shortest match that counts; if there is none, the answer is (0, 0, 0).
        """
        tokens, order, wanted = self._tokens, self._order, list(tail[-SPAN:])[::-1]
        at = bisect_left(order, wanted, key=lambda place: tokens[place : place + SPAN].tolist())  # type: ignore[call-overload]
        matched = 0
        for near in (at - 1, at):
            if 0 <= near < len(order):
                matched = max(matched, _agreeing(wanted, tokens[order[near] : order[near] + SPAN].tolist()))
        if matched < least or not matched:
            return 0, 0, 0
        wanted = wanted[:matched]
        outside = lambda i: tokens[order[i] : order[i] + matched].tolist() != wanted  # noqa: E731 - three short uses
        below = at if at == len(order) or outside(at) else at + 1  # one past a place that matches
        first = below - _stretch(lambda n: below - n < 0 or outside(below - n))
        last = below + _stretch(lambda n: below + n > len(order) or outside(below + n - 1))
        return matched, first, last

    def continuations(self, first: int, last: int, depth: int, most: int) -> list[list[int]]:
        """Up to `depth` tokens after each of `most` places spread over a range; none crosses a document's end."""
        tokens, found = self._tokens, []
        step = max((last - first) / most, 1.0)
        for i in range(min(last - first, most)):
            place = self._order[first + int(i * step)]
            ahead = tokens[max(place - depth, 0) : place].tolist()[::-1]
            found.append(ahead[: ahead.index(JUNCTION)] if JUNCTION in ahead else ahead)
        return found

    @classmethod
    def build(
        cls, documents: Iterable[Sequence[int]], progress: Callable[[str, float], None] | None = None
    ) -> CorpusIndex:
        """Indexes documents of token ids. The index has 8 bytes per token; building it takes about 50 bytes per token.

        Raises:
            ValueError: a token id is negative, no document has two tokens, or there are 2 ** 31 tokens or more.
        """
        parts = []
        for document in documents:
            ids = np.asarray(document, dtype=np.int32)
            if ids.size and ids.min() < 0:
                raise ValueError(f"a document has token {ids.min()}; token ids are 0 or more")
            parts += [ids, np.array([JUNCTION], np.int32)]
        flat = np.concatenate([np.empty(0, np.int32), *parts])[::-1].copy()  # (tokens,)
        if len(flat) >= 1 << 31:
            raise ValueError(f"{len(flat)} tokens are too many for one index; build it from less than 2 ** 31")
        order = _sorted_places(flat, progress or (lambda what, share: None))
        if not len(order):
            raise ValueError("no document has two tokens; give a corpus that is not empty")
        return cls(flat.data, order.data, int(flat.max()))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, or copies the file that the index is mapped from."""
        path = Path(path)
        if self.path is None:
            arrays = {"backwards": np.asarray(self._tokens), "order": np.asarray(self._order)}
            write_arrays(path, FORMAT, arrays, largest=str(self.largest))
        elif path.resolve() != self.path.resolve():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path, path)

    @classmethod
    def load(cls, path: str | Path) -> CorpusIndex:
        """Maps a file from `save` into memory; pages are read only when they are needed."""
        way_out = "build an index with scripts/build_datastore.py"
        arrays, metadata = read_arrays(path, FORMAT, {"backwards": ("I32", 1), "order": ("I32", 1)}, way_out)
        if not (largest := metadata.get("largest", "")).isdecimal():
            raise ValueError(f"{path} has largest={largest!r}, expected a token id: {way_out}")
        return cls(arrays["backwards"].data, arrays["order"].data, int(largest), Path(path))


def _agreeing(wanted: list[int], found: list[int]) -> int:
    """How many tokens at the beginning are the same."""
    pairs = zip(wanted, found, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(wanted), len(found)))


def _stretch(outside: Callable[[int], bool]) -> int:
    """The largest n for which `outside(n)` is still false, in O(log n) steps; once true, `outside` stays true."""
    reach = 1
    while not outside(reach):
        reach *= 2
    low = reach // 2
    while low + 1 < reach:
        middle = (low + reach) // 2
        low, reach = (low, middle) if outside(middle) else (middle, reach)
    return low


def _sorted_places(flat: np.ndarray, progress: Callable[[str, float], None]) -> np.ndarray:
    """(places,) places of `flat` sorted by the `SPAN` tokens from there on; ties by place.

    It sorts by one token after the other, the farthest first. Only places of tokens that another token follows in the
    document (in `flat`, which is backwards: precedes) are kept.
    """
    padded = (
        np.pad(flat.astype(np.int64), (0, SPAN), constant_values=JUNCTION - 1) + 2
    )  # (tokens + SPAN,) 0 is past the end
    padded = padded.astype(np.min_scalar_type(padded.max()))  # numpy sorts small integers faster
    order = np.arange(len(flat))  # (tokens,)
    for done, ahead in enumerate(reversed(range(SPAN))):
        progress("sorting", done / SPAN)
        order = order[np.argsort(padded[order + ahead], kind="stable")]
    progress("sorting", 1.0)
    useful = (flat[order] != JUNCTION) & (order > 0)  # (tokens,) bool
    useful &= flat[order - 1] != JUNCTION
    return order[useful].astype(np.int32)
