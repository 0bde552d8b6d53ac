"""Reads a table from a safetensors file that may come from anywhere, and checks it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

__all__ = ["read_arrays"]


def read_arrays(
    path: str | Path, format: str, parts: Mapping[str, tuple[str, int]], way_out: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a table's file, and its metadata.

    Args:
        format: what the metadata must call the format.
        parts: name of each array -> (type as safetensors calls it, number of dimensions).
        way_out: for messages: how to get a right file.

    Raises:
        ValueError: the file is of another kind; the message names it.
        FileNotFoundError: there is no file.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise ValueError(f"{path} has format {metadata.get('format')!r}, not {format!r}: {way_out}")
            if missing := sorted(set(parts) - set(file.keys())):
                raise ValueError(f"{path} lacks {', '.join(missing)}: {way_out}")
            for name, (type, dimensions) in parts.items():
                part = file.get_slice(name)
                if part.get_dtype() != type or len(part.get_shape()) != dimensions:
                    raise ValueError(
                        f"{path}: {name} is {part.get_dtype()} of shape {tuple(part.get_shape())}, expected "
                        f"{type} of {dimensions} dimensions: {way_out}"
                    )
            return {name: file.get_tensor(name) for name in parts}, metadata
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): {way_out}") from error
