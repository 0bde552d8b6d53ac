"""Tables in safetensors files: writes them, and reads and checks files that may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from csdraft.stored import naming

__all__ = ["ArrayTable", "read_arrays", "write_arrays"]

Stored = Mapping[str, tuple[str, int]]
"""Name of each array -> (its type as safetensors calls it, its number of dimensions)."""
TYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64}


def write_arrays(path: str | Path, format: str, arrays: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Writes a table's file; makes the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.atleast_1d(values) for name, values in arrays.items()}, path, {"format": format, **metadata})


def read_arrays(
    path: str | Path, format: str, stored: Stored, way_out: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a table's file, and its metadata. Arrays are mapped: a page is read when it is used.

    Raises:
        ValueError: the file is of another kind; the message names it, and ends with the way out.
        FileNotFoundError: there is no file.
    """
    try:
        with safe_open(path, "pt") as file:  # only torch's tensors are mapped
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise ValueError(f"{path} has format {metadata.get('format')!r}, not {format!r}: {way_out}")
            if missing := sorted(set(stored) - set(file.keys())):
                raise ValueError(f"{path} lacks {', '.join(missing)}: {way_out}")
            for name, (type, dimensions) in stored.items():
                part = file.get_slice(name)
                if part.get_dtype() != type or len(part.get_shape()) != dimensions:
                    raise ValueError(
                        f"{path}: {name} is {part.get_dtype()} of shape {tuple(part.get_shape())}, expected "
                        f"{type} of {dimensions} dimensions: {way_out}"
                    )
            return {name: file.get_tensor(name).numpy() for name in stored}, metadata
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): {way_out}") from error


@dataclass(frozen=True, eq=False)
class ArrayTable:
    """A table whose fields are arrays. It never changes, so threads may share it; equal tables have equal hashes."""

    format: ClassVar[str]
    stored: ClassVar[Stored]
    way_out: ClassVar[str]

    def __post_init__(self) -> None:
        for name, (type, _) in self.stored.items():
            values = np.array(getattr(self, name), TYPES[type])
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in self.stored)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name).tobytes() for name in self.stored))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        write_arrays(path, self.format, {name: getattr(self, name) for name in self.stored})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote; raises ValueError for any other file."""
        arrays, _ = read_arrays(path, cls.format, cls.stored, cls.way_out)
        with naming(path):
            return cls(**arrays)
