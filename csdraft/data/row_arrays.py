"""What a frozen target computes along texts, stored on disk: arrays with one entry per kept position of each row.

Every process writes its share of the rows into the same files. A row is marked as done after its numbers are written,
so a run that was killed continues with the next row. The size of the files is compared with the free space before the
target is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from csdraft.amounts import size_text
from csdraft.data.shards import Part, batches, check_unchanged, write_whole
from csdraft.data.sources import read_rows
from csdraft.data.target import TargetArguments, check_at_least, check_context, check_writable, option, read_target

__all__ = ["RowArguments", "RowArrays", "checksum", "largest_of", "lengths_of", "prompt_lengths_of"]

DONE = "done.u8"


@dataclass(frozen=True)
class RowArrays:
    """Reads what `write` wrote.

    Attributes:
        folder: of the files.
        what: the name of the stored values in messages.
        document: the file that describes the others.
        smaller: what to ask for if the disk is too small.

    Raises:
        ValueError: the folder holds no such files, or rows are missing because a writer was stopped.
    """

    folder: str | os.PathLike[str]
    what: ClassVar[str]
    document: ClassVar[str]
    smaller: ClassVar[str]

    def __post_init__(self) -> None:
        if not Path(self.folder, self.document).is_file():
            raise ValueError(f"{self.folder} holds no cached {self.what}; write them first")
        done = np.fromfile(Path(self.folder, DONE), np.uint8)
        if missing := int((done == 0).sum()):
            raise ValueError(f"{missing} of {len(done)} rows are missing in {self.folder}: run its writer again")

    def __reduce__(self) -> tuple:
        """A data loader's workers open the files themselves."""
        return type(self), (self.folder,)

    # Defined by each kind.

    @staticmethod
    def columns(description: Mapping[str, Any]) -> dict[str, np.dtype]:
        """Each file's name, and the type of one position's entry."""
        raise NotImplementedError

    @staticmethod
    def sizes_of(rows: Any) -> np.ndarray:
        """(rows,) number of positions kept of each row."""
        raise NotImplementedError

    @staticmethod
    def compute(
        target: Any, ids: Tensor, lengths: np.ndarray, sizes: np.ndarray, description: Mapping[str, Any]
    ) -> Iterable[Mapping[str, Tensor]]:
        """What to store of each row, by file.

        Args:
            target: a causal LM.
            ids: (rows, longest) int64, padded on the right, on the target's device.
            lengths: (rows,) tokens of each row.
            sizes: (rows,) as `sizes_of` gives them.
        """
        raise NotImplementedError

    def packed(self, row: int) -> Tensor:
        """(length, width) what a training step reads along a row."""
        raise NotImplementedError

    # Reading.

    def size(self, row: int) -> int:
        """How many positions of a row are kept."""
        return self.ends[row + 1] - self.ends[row]

    def read(self, name: str, row: int) -> np.ndarray:
        """A row's entries in one file, (positions,) or (positions, width)."""
        return np.array(self.arrays[name][self.ends[row] : self.ends[row + 1]])

    def check(self, rows: Any) -> None:
        """Raises ValueError if the files belong to other rows, or to other positions of them."""
        if self.description["texts"] != (found := checksum(rows)):
            raise ValueError(
                f"the {self.what} in {self.folder} are of other texts (checksum {self.description['texts']}) than "
                f"these ({found}); write them again, into another folder"
            )
        stored, sizes = np.diff(self.ends), self.sizes_of(rows)
        if len(other := (stored != sizes).nonzero()[0]):
            raise ValueError(
                f"the {self.what} in {self.folder} are of {stored[other[0]]} positions of row {other[0]}, which has "
                f"{sizes[other[0]]} after its prompt: prompts were cut at another place; write them again, into "
                "another folder"
            )

    def check_target(self, name: str) -> None:
        """Raises ValueError if they come from another target than `name`; see `csdraft.data.target.target_name`."""
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
        """Each row's number of tokens."""
        return np.load(Path(self.folder, "lengths.npy")).tolist()

    @cached_property
    def ends(self) -> list[int]:
        """Row i has the entries from `ends[i]` to `ends[i + 1]`."""
        return [0, *np.load(Path(self.folder, "sizes.npy")).cumsum().tolist()]

    @cached_property
    def arrays(self) -> dict[str, np.memmap]:
        return _open(Path(self.folder), self.columns(self.description), self.ends[-1], "r")

    # Writing.

    @classmethod
    @torch.no_grad()
    def write(
        cls,
        load_target: Callable[[], Any],
        rows: Any,
        folder: str | os.PathLike[str],
        description: Mapping[str, Any],
        batch_size: int = 8,
        part: Part | None = None,
    ) -> None:
        """Writes the files, or what is still missing in them.

        Args:
            load_target: returns a causal LM; called only if a row is missing.
            rows: as `csdraft.data.sources.read_rows` gives them.
            description: what the files hold, the `target` by name. Files with another description are not continued.
            batch_size: rows read at once; what the target computes of them must fit into memory.
            part: which process this is; None reads the environment.

        Raises:
            ValueError: the rest does not fit on the disk, or `folder` holds something else.
        """
        path, part = Path(folder), part or Part.of_environment()
        lengths, sizes, columns = lengths_of(rows), cls.sizes_of(rows), cls.columns(description)
        if not sizes.sum():
            raise ValueError(f"the rows have no position whose {cls.what} could be kept; give rows with responses")
        path.mkdir(parents=True, exist_ok=True)
        cls._check_disk(path, sizes, columns, part)
        cls._prepare(path, {**description, "rows": len(lengths), "texts": checksum(rows)}, lengths, sizes, columns)
        arrays = _open(path, columns, int(sizes.sum()), "r+")
        done, ends = np.memmap(path / DONE, np.uint8, "r+"), [0, *sizes.cumsum().tolist()]
        missing = [batch for batch in part.of(batches(lengths.tolist(), batch_size)) if not done[batch].all()]
        if not missing:
            return
        target = load_target()
        with tqdm(total=sum(map(len, missing)), unit=" rows", desc=cls.what, disable=part.local_rank > 0) as bar:
            for batch in missing:
                texts = [torch.tensor(rows[row]["input_ids"]) for row in batch]
                ids = pad_sequence(texts, batch_first=True).to(target.device)  # (rows, longest)
                found = cls.compute(target, ids, lengths[batch], sizes[batch], description)
                for row, values in zip(batch, found, strict=True):
                    for file, value in values.items():
                        arrays[file][ends[row] : ends[row + 1]] = value.cpu().numpy()
                done[batch] = 1
                bar.update(len(batch))

    @classmethod
    def _check_disk(cls, folder: Path, sizes: np.ndarray, columns: Mapping[str, np.dtype], part: Part) -> None:
        """Prints the size of the files; raises ValueError if what is not yet written does not fit."""
        each = sum(dtype.itemsize for dtype in columns.values())
        done = np.fromfile(folder / DONE, np.uint8) if (folder / DONE).is_file() else np.zeros(len(sizes), np.uint8)
        left = sizes[done == 0] if len(done) == len(sizes) else sizes
        needed, free = int(left.sum()) * each, shutil.disk_usage(folder).free
        total, needed_text, free_text = map(size_text, (int(sizes.sum()) * each + len(sizes), needed, free))
        if part.rank == 0:
            print(
                f"{cls.what} of {len(sizes):,} rows, {int(sizes.sum()):,} positions: {total} in {folder}, "
                f"{needed_text} still to write; {free_text} free"
            )
        if needed > free:
            raise ValueError(
                f"the {cls.what} take {needed_text}, but {free_text} are free in {folder}; give another folder, "
                f"fewer rows, or {cls.smaller}"
            )

    @classmethod
    def _prepare(
        cls,
        folder: Path,
        description: dict[str, Any],
        lengths: np.ndarray,
        sizes: np.ndarray,
        columns: Mapping[str, np.dtype],
    ) -> None:
        """Creates files of their full size, which are sparse until written; all processes create the same ones."""
        path = folder / cls.document
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        check_unchanged(f"{folder} holds the cache of", found, description, "Give another folder, or remove it")
        files = {name: int(sizes.sum()) * dtype.itemsize for name, dtype in columns.items()}
        for name, size in {**files, DONE: len(sizes)}.items():
            with open(folder / name, "ab") as file:
                file.truncate(size)
        for name, array in (("lengths.npy", lengths), ("sizes.npy", sizes)):
            with write_whole(folder / name) as file:
                np.save(file, array)
        with write_whole(path) as file:
            file.write(json.dumps(description).encode())


def _open(folder: Path, columns: Mapping[str, np.dtype], positions: int, mode: Any) -> dict[str, np.memmap]:
    """Each file as (positions,) or (positions, width); numpy appends the shape of the column's type."""
    return {name: np.memmap(folder / name, dtype, mode, shape=(positions,)) for name, dtype in columns.items()}


@dataclass
class RowArguments(TargetArguments):
    """A target, and the rows that it reads."""

    max_length: int = option(512, "Tokens in a row at most; as when training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 2, "max_length")

    def read(self, what: str) -> tuple[Any, Any]:
        """The target's config, and the rows that training reads; also sets torch's threads.

        Args:
            what: the name of the stored values in messages.

        Raises:
            ValueError: the data cannot be read, the target is not decoder-only, or rows are longer than its context.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        check_writable(self.output_dir)
        config, tokenizer = read_target(self)
        if config.is_encoder_decoder:
            raise ValueError(f"{self.target} is an encoder-decoder; {what} are cached for decoder-only targets")
        check_context(self.max_length, config)
        return config, read_rows(self.dataset, tokenizer, self.max_length, self.split, self.dataset_limit, self.chat)


# Columns of rows, which are a list of dicts or a `datasets.Dataset`.


def lengths_of(rows: Any) -> np.ndarray:
    """(rows,) int64 number of tokens in each."""
    return np.array([len(ids) for ids in _token_ids(rows)], dtype=np.int64)


def largest_of(rows: Any) -> tuple[int, int]:
    """The largest token id, and the first row that has it."""
    found = [int(max(ids) if isinstance(ids, list) else np.max(ids)) if len(ids) else 0 for ids in _token_ids(rows)]
    row = int(np.argmax(found))
    return found[row], row


def prompt_lengths_of(rows: Any) -> np.ndarray:
    """(rows,) int64 number of each row's first tokens that are not scored."""
    if isinstance(rows, list):
        found = [row.get("prompt_length") for row in rows]
    else:
        found = rows["prompt_length"] if "prompt_length" in rows.column_names else [0] * len(rows)
    return np.array([length or 0 for length in found], dtype=np.int64)


def checksum(rows: Any) -> str:
    """Checksum of all tokens, row by row."""
    found = 0
    for ids in _token_ids(rows):
        found = zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes() + b"\n", found)
    return f"{found:08x}"


def _token_ids(rows: Any) -> Iterator[Any]:
    if isinstance(rows, list):
        yield from (row["input_ids"] for row in rows)
    else:
        for batch in rows.with_format("numpy", columns=["input_ids"]).iter(1000):
            yield from batch["input_ids"]
