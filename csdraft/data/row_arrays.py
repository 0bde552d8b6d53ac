"""What a frozen target computes along texts, on disk: arrays with one entry for each kept position of each row.

Every process writes its share of the rows into the same files. A row is marked as done after its numbers are written,
so that a run killed anywhere continues with the next row. What the files take is known, and compared with what is
free, before the target is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from csdraft.amounts import size_text
from csdraft.data.changes import check_unchanged
from csdraft.data.shards import Part, batches, write_whole
from csdraft.data.sources import read_rows
from csdraft.data.target import TargetArguments

__all__ = ["Column", "RowArguments", "RowArrays", "checksum", "columns_of", "lengths_of", "write_rows"]

DONE = "done.u8"


class Column(NamedTuple):
    """One file: numbers of this type, `width` of them a position; 0 is a single one."""

    dtype: Any
    width: int

    @property
    def bytes(self) -> int:
        """Bytes a position."""
        return np.dtype(self.dtype).itemsize * max(self.width, 1)


@dataclass(frozen=True)
class RowArrays:
    """Reads what `write_rows` wrote.

    Args:
        folder: of the files.

    Attributes:
        what: how messages call what is kept.
        document: the file that says what it is.

    Raises:
        ValueError: there is nothing, or a part is missing because its writer was stopped.
    """

    folder: str | os.PathLike[str]
    what: ClassVar[str]
    document: ClassVar[str]

    def __post_init__(self) -> None:
        if not Path(self.folder, self.document).is_file():
            raise ValueError(f"{self.folder} holds no cached {self.what}; write them first")
        if missing := int((self.done == 0).sum()):
            raise ValueError(f"{missing} of {len(self.done)} rows are missing in {self.folder}: run its writer again")

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple:
        """Workers of a data loader open the files themselves."""
        return type(self), (self.folder,)

    # What a kind says.

    @staticmethod
    def columns(description: Mapping[str, Any]) -> dict[str, Column]:
        """The files, by name."""
        raise NotImplementedError

    @staticmethod
    def sizes_of(rows: Any) -> np.ndarray:
        """(rows,) how many positions of each row are kept."""
        raise NotImplementedError

    @staticmethod
    def advice(description: Mapping[str, Any], bytes_left: int) -> str:
        """What would fit into so many bytes a position, after "or "."""
        raise NotImplementedError

    def packed(self, row: int) -> Tensor:
        """(length, width) float32 what a training step reads of a row."""
        raise NotImplementedError

    # Reading.

    def read(self, name: str, row: int) -> np.ndarray:
        """A row's entries of one file, (positions,) or (positions, width)."""
        start, stop = self.ends[row : row + 2]
        return np.array(self.arrays[name][start:stop])

    def check(self, rows: Any) -> None:
        """Raises ValueError if the files are of other rows, or of other parts of them."""
        if self.description["texts"] != (found := checksum(rows)):
            raise ValueError(
                f"the {self.what} in {self.folder} are of other texts (checksum {self.description['texts']}) than "
                f"these ({found}); write them again, into another folder"
            )
        if other := (np.diff(self.ends) != (sizes := self.sizes_of(rows))).nonzero()[0].tolist():
            row = other[0]
            raise ValueError(
                f"the {self.what} in {self.folder} are of {self.ends[row + 1] - self.ends[row]} positions of row "
                f"{row}, which has {sizes[row]} after its prompt: prompts were cut otherwise; write them again, into "
                "another folder"
            )

    def check_target(self, name: str) -> None:
        """Raises ValueError if they are of another target than `csdraft.data.target.target_name` says."""
        if (found := self.description["target"]) != name:
            raise ValueError(
                f"the {self.what} in {self.folder} are of the target {found}, not of {name}; write them with this "
                "target, into another folder"
            )

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads(Path(self.folder, self.document).read_text(encoding="utf-8"))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return np.load(Path(self.folder, "lengths.npy")).tolist()

    @cached_property
    def ends(self) -> list[int]:
        """Where each row's positions end in the arrays; one more than rows, the first is 0."""
        return [0, *np.load(Path(self.folder, "sizes.npy")).cumsum().tolist()]

    @cached_property
    def arrays(self) -> dict[str, np.memmap]:
        return _open(Path(self.folder), self.columns(self.description), self.ends[-1], "r")

    @cached_property
    def done(self) -> np.ndarray:
        return np.memmap(Path(self.folder, DONE), np.uint8, "r")


@dataclass
class RowArguments(TargetArguments):
    """A target, and rows that it is to read."""

    max_length: int = field(default=512, metadata={"help": "Tokens of a row at most; as when training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(2, "max_length")

    def read(self, what: str) -> tuple[Any, Any]:
        """The target's config, and the rows as `read_rows` reads them for training; sets torch's threads.

        Args:
            what: is to be kept of them, in messages.

        Raises:
            ValueError: for data that cannot be read, a target that is no decoder-only model, and rows longer than its
                context.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        self.folder()
        config, tokenizer = self.read_target()
        if config.is_encoder_decoder:
            raise ValueError(f"{self.target} is an encoder-decoder; {what} are cached for decoder-only targets")
        context = getattr(config, "max_position_embeddings", None)
        if context and self.max_length > context:
            raise ValueError(f"max_length={self.max_length} is longer than the target's context of {context} tokens")
        return config, read_rows(self.dataset, tokenizer, self.max_length, self.split, self.dataset_limit, self.chat)


def write_rows(
    kind: type[RowArrays],
    load_target: Callable[[], Any],
    compute: Callable[[Any, Sequence[Sequence[int]], np.ndarray], Sequence[Mapping[str, np.ndarray]]],
    rows: Any,
    folder: str | os.PathLike[str],
    description: Mapping[str, Any],
    count: str,
    batch_size: int = 8,
    part: Part | None = None,
) -> None:
    """Writes the files, or what is still missing of them.

    Args:
        kind: what reads them.
        load_target: gives a causal LM; called if a row is missing.
        compute: from the target, the tokens of some rows, and how many positions of each are kept, what is stored of
            each row, by file.
        rows: of `csdraft.data.sources.read_rows`.
        folder: for the files.
        description: what they are; files of something else are not gone on with.
        count: of the numbers a position, in words.
        batch_size: rows read at once.
        part: which process of how many this is; None asks the environment.

    Raises:
        ValueError: the rest does not fit on the disk, or `folder` holds something else.
    """
    path, part = Path(folder), part or Part.of_environment()
    lengths, sizes, columns = lengths_of(rows), kind.sizes_of(rows), kind.columns(description)
    path.mkdir(parents=True, exist_ok=True)
    _check_disk(path, sizes, kind, description, part, count)
    _prepare(path, kind, {**description, "rows": len(lengths), "texts": checksum(rows)}, lengths, sizes)
    ends, arrays = [0, *sizes.cumsum().tolist()], _open(path, columns, int(sizes.sum()), "r+")
    done = np.memmap(path / DONE, np.uint8, "r+")
    missing = [batch for batch in part.of(batches(lengths.tolist(), batch_size)) if not done[batch].all()]
    if not missing:
        return
    target = load_target()
    for batch in _shown(missing, part, kind.what):
        found = compute(target, [rows[row]["input_ids"] for row in batch], sizes[batch])
        for row, values in zip(batch, found, strict=True):
            for file, value in values.items():
                arrays[file][ends[row] : ends[row + 1]] = value
        done[batch] = 1


def _shown(missing: Sequence[list[int]], part: Part, what: str) -> Iterator[list[int]]:
    with tqdm(total=sum(map(len, missing)), unit=" rows", desc=what, disable=part.local_rank > 0) as bar:
        for batch in missing:
            yield batch
            bar.update(len(batch))


def _open(folder: Path, columns: Mapping[str, Column], positions: int, mode: Any) -> dict[str, np.memmap]:
    shapes = {name: (positions, column.width)[: 2 if column.width else 1] for name, column in columns.items()}
    return {name: np.memmap(folder / name, columns[name].dtype, mode, shape=shape) for name, shape in shapes.items()}


def _prepare(
    folder: Path, kind: type[RowArrays], description: dict[str, Any], lengths: np.ndarray, sizes: np.ndarray
) -> None:
    """Files of full size, which take no place before they are written; the same from every process."""
    path = folder / kind.document
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    check_unchanged(f"{folder} holds the cache of", found, description, "Give another folder, or remove it")
    files = {name: int(sizes.sum()) * column.bytes for name, column in kind.columns(description).items()}
    for name, size in {**files, DONE: len(sizes)}.items():
        with open(folder / name, "ab") as file:
            file.truncate(size)
    for name, array in (("lengths.npy", lengths), ("sizes.npy", sizes)):
        with write_whole(folder / name) as file:
            np.save(file, array)
    with write_whole(path) as file:
        file.write(json.dumps(description).encode())


def _check_disk(
    folder: Path, sizes: np.ndarray, kind: type[RowArrays], description: Mapping[str, Any], part: Part, count: str
) -> None:
    each = sum(column.bytes for column in kind.columns(description).values())
    done = np.fromfile(folder / DONE, np.uint8) if (folder / DONE).is_file() else np.zeros(len(sizes), np.uint8)
    left = sizes[done == 0] if len(done) == len(sizes) else sizes
    total, needed, free = int(sizes.sum()) * each + len(sizes), int(left.sum()) * each, shutil.disk_usage(folder).free
    if part.rank == 0:
        print(
            f"{len(sizes):,} rows, {int(sizes.sum()):,} positions x {count} {kind.what}: {size_text(total)} in "
            f"{folder}, {size_text(needed)} of it to be written; {size_text(free)} are free"
        )
    if needed > free:
        raise ValueError(
            f"the {kind.what} take {size_text(needed)}, but {size_text(free)} are free in {folder}; give another "
            f"folder, fewer rows, or {kind.advice(description, free // max(int(left.sum()), 1))}"
        )


def lengths_of(rows: Any) -> np.ndarray:
    """(rows,) tokens of each."""
    return np.array([len(row["input_ids"]) for row in columns_of(rows, "input_ids")])


def checksum(rows: Any) -> str:
    """Of all tokens, row by row."""
    found = 0
    for row in columns_of(rows, "input_ids"):
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        found = zlib.crc32(ids.tobytes() + b"\n", found)
    return f"{found:08x}"


def columns_of(rows: Any, *names: str) -> Any:
    """Rows that need not decode more than these columns."""
    return rows if isinstance(rows, list) else rows.select_columns([n for n in names if n in rows.column_names])
