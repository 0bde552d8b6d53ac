"""Rows that several processes write, any of which may be killed at any byte: no row is lost or written twice.

Each process takes every n-th batch of a plan that depends on the rows alone, and appends one line of JSON for each
finished row to its own file. A process that starts later reads all files; an incomplete line counts as not written.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

__all__ = ["Part", "Place", "Shard", "batches", "check_unchanged", "finished", "store", "stored", "write_whole"]

WINDOW = 32
"""Number of batches whose rows are sorted by length together."""


class Part(NamedTuple):
    """One of several processes: its rank, their number, and its rank on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Part:
        """As `accelerate launch` and `torchrun` set it; a single process without them."""
        rank, world_size, local_rank = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(int(rank or 0), int(world_size or 1), int(local_rank or 0))

    def of(self, plan: Sequence[list[int]]) -> list[list[int]]:
        """This process's batches."""
        return list(plan[self.rank :: self.world_size])


def batches(lengths: Sequence[int], size: int, kinds: Sequence[Any] | None = None) -> list[list[int]]:
    """Batches of rows of similar length. More rows at the end change only the last `WINDOW` batches.

    Args:
        lengths: each row's number of tokens.
        kinds: each row's kind; a batch has rows of one kind only.
    """
    kinds = [0] * len(lengths) if kinds is None else kinds
    plan = []
    for start in range(0, len(lengths), WINDOW * size):
        window = range(start, min(start + WINDOW * size, len(lengths)))
        for kind in sorted({kinds[row] for row in window}):
            rows = sorted((row for row in window if kinds[row] == kind), key=lambda row: lengths[row])
            plan += [rows[i : i + size] for i in range(0, len(rows), size)]
    return plan


def check_unchanged(begun: str, before: Mapping[str, Any], now: Mapping[str, Any], way_out: str) -> None:
    """Raises ValueError if a key that both have has another value now.

    Args:
        begun: the beginning of the message, which continues with "key=value".
        way_out: what the user can do, as a sentence without its full stop.
    """
    other = [key for key in before if key in now and before[key] != now[key]]
    if other:
        differences = "; ".join(f"{key}={before[key]!r}, now it is {now[key]!r}" for key in other)
        raise ValueError(f"{begun} {differences}. {way_out}")


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name only once it is complete."""
    new = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with new.open("wb") as file:
            yield file
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


class Shard:
    """Appends rows to one file, after removing the incomplete line that a killed process may have left at its end."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+b")
        if self.file.tell():  # an empty file cannot be mapped
            with mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as written:
                end = written.rfind(b"\n") + 1
            self.file.truncate(end)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Hands the rows to the operating system, so that they survive this process."""
        self.file.write(b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows))
        self.file.flush()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


class Place(NamedTuple):
    """Where a finished row is stored."""

    path: Path
    offset: int

    def read(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return json.loads(file.readline())


def finished(folder: Path) -> Iterator[tuple[dict[str, Any], Place]]:
    """All complete rows in a folder's files, from every process; skips lines that are incomplete or damaged."""
    for path in sorted(folder.glob("*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and (row := _row(line)) is not None:
                    yield row, Place(path, offset)
                offset += len(line)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "index" in row else None


def stored(folder: Path) -> int:
    """Number of rows in the data set that `store` left in a folder; 0 if there is none."""
    if not (folder / "dataset_info.json").is_file():
        return 0
    import datasets

    return len(datasets.load_from_disk(folder))


def store(folder: Path, places: Sequence[Place]) -> Any:
    """Stores rows as a `datasets.Dataset` in `folder` and replaces the one that is there.

    Several processes may do so at once; a reader finds the old data set or the new one.

    Args:
        places: of the rows, in order.
    """
    import datasets

    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "prompt_length": datasets.Value("int32"),
            "index": datasets.Value("int64"),
        }
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".storing-") as scratch:
        rows = datasets.Dataset.from_generator(
            _read_all,
            features,
            cache_dir=scratch,
            gen_kwargs={"places": tuple(places)},
            fingerprint=uuid.uuid4().hex,  # so that `datasets` never reuses what it derived from an older data set
        )
        new = Path(scratch, "new")
        rows.save_to_disk(new)
        data = sorted(path.name for path in new.glob("*.arrow"))
        for name in [*data, "state.json", "dataset_info.json"]:  # each refers only to files moved before it
            os.replace(new / name, folder / name)
    for path in folder.glob("*.arrow"):
        if path.name not in data:
            path.unlink(missing_ok=True)
    return datasets.load_from_disk(folder)


def _read_all(places: Sequence[Place]) -> Iterator[dict[str, Any]]:
    for place in places:
        yield place.read()
