"""A table of documents, as token ids, that drafts can be copied from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from csdraft.stored import kind_of, naming, shown
from csdraft.tables._file import read_arrays, write_arrays
from csdraft.tables.suffix_automaton import JUNCTION, SuffixAutomaton

__all__ = ["DocumentTable"]

FORMAT = "csdraft-documents-1"


class DocumentTable:
    """A table that never changes, so threads may share it. Once it is searched it takes about 150 bytes per token.

    Args:
        documents: token ids of each document; empty documents are left out.

    Raises:
        ValueError: they are not lists of whole numbers of at least 0.
    """

    def __init__(self, documents: Sequence[Sequence[int]]):
        self.tokens: list[int] = []
        self._ends: list[int] = []  # one past each document's last token
        try:
            given = list(documents)
        except TypeError as error:
            kind = kind_of(documents)
            raise ValueError(f"documents={shown(documents)} is {kind}; give a list of token ids for each") from error
        for number, document in enumerate(given):
            ids = _token_ids(document, number)
            if ids:
                if min(ids) < 0:
                    raise ValueError(f"document {number} has token {min(ids)}; token ids are 0 or more")
                self.tokens += ids
                self._ends.append(len(self.tokens))

    @classmethod
    def encode(cls, texts: Sequence[str], tokenizer: Any) -> DocumentTable:
        """A table of these texts, tokenized without special tokens."""
        return cls([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])

    def __len__(self) -> int:
        """Tokens of all documents."""
        return len(self.tokens)

    @cached_property
    def largest(self) -> int:
        """The largest token id; -1 for an empty table."""
        return max(self.tokens, default=-1)

    @cached_property
    def automaton(self) -> SuffixAutomaton:
        """The documents' automaton. It reads a junction instead of each last token, so a token follows every match."""
        made, start = SuffixAutomaton(), 0
        for end in self._ends:
            made.extend([*self.tokens[start : end - 1], JUNCTION])
            start = end
        return made

    def after(self, place: int, depth: int) -> list[int]:
        """At most `depth` tokens after a place, up to the end of its document."""
        end = self._ends[bisect_right(self._ends, place)]
        return self.tokens[place + 1 : min(place + 1 + depth, end)]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        arrays = {"tokens": np.array(self.tokens, np.int32), "ends": np.array(self._ends, np.int64)}
        write_arrays(path, FORMAT, arrays)

    @classmethod
    def load(cls, path: str | Path) -> DocumentTable:
        """Reads what `save` wrote."""
        wanted = {"tokens": ("I32", 1), "ends": ("I64", 1)}
        parts, _ = read_arrays(path, FORMAT, wanted, "save one with DocumentTable.save")
        tokens, ends = parts["tokens"], parts["ends"]
        if (np.diff(ends, prepend=0, append=len(tokens)) < 0).any() or (ends[-1] if len(ends) else 0) != len(tokens):
            raise ValueError(f"{path}: ends, one for each document, must rise to the number of tokens, {len(tokens)}")
        with naming(path):
            return cls([part.tolist() for part in np.split(tokens, ends[:-1])])


def _token_ids(document: Any, number: int) -> list[int]:
    """A document's token ids; raises ValueError if it is something else."""
    try:
        if not isinstance(document, str | bytes | Mapping):
            return list(map(index, document))
    except TypeError:
        pass
    kind = "a text" if isinstance(document, str) else f"{kind_of(document)}, {shown(document)}"
    raise ValueError(f"document {number} is {kind}; give token ids, or DocumentTable.encode(texts, tokenizer)")
