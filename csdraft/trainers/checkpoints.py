"""Checkpoints of a run: which are whole, and which is the newest.

`run.json` is written last and lists every file with its size and checksum. A kill, a full disk or a power failure can
leave a checkpoint without it, or with a file that is missing or differs. Such a checkpoint is skipped: a run resumes
from the newest whole one.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from csdraft.data.shards import write_whole

__all__ = ["UNREADABLE", "chosen_checkpoint", "flaw", "last_checkpoint", "mark_whole", "passed_over", "read_mark"]

MARK = "run.json"
BLOCK = 1 << 22
"""Bytes read at once for a checksum."""
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError)
"""Errors of reading a file that is cut or damaged."""


def chosen_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one `resume_from_checkpoint` names, else the newest whole one.

    None if there is no checkpoint, or `resume_from_checkpoint` is false.

    Raises:
        ValueError: the named folder holds no whole checkpoint, or `output_dir` has checkpoints and none is whole.
    """
    named, output_dir = args.resume_from_checkpoint, args.output_dir or ""
    if named is False:
        return None
    if named is not None and named is not True:
        if reason := flaw(Path(named)):
            raise ValueError(
                f"resume_from_checkpoint={named!r} holds no whole checkpoint: {reason}. Name a folder checkpoint-N, "
                "or leave it out for the newest of output_dir"
            )
        return str(named)
    newest, broken = last_checkpoint(output_dir), passed_over(output_dir)
    if newest is None and broken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        raise ValueError(
            f"{output_dir} has no whole checkpoint to resume from ({reasons}). Give another output_dir, or begin "
            "again with resume_from_checkpoint=false"
        )
    return newest


def last_checkpoint(output_dir: str) -> str | None:
    """The whole checkpoint that was written last; None if there is none.

    This is not always the one with the most steps: a run that was begun again in its folder may have fewer.
    """
    newest_first = sorted(_folders(output_dir), key=_written, reverse=True)
    return next((str(folder) for folder in newest_first if flaw(folder) is None), None)


def passed_over(output_dir: str) -> dict[str, str]:
    """Name -> reason, of the broken checkpoints with more steps than the one to resume from."""
    newest = last_checkpoint(output_dir)
    later = takewhile(lambda folder: str(folder) != newest, _folders(output_dir))
    found = {folder.name: flaw(folder) for folder in later}
    return {name: reason for name, reason in found.items() if reason is not None}


def _folders(output_dir: str) -> list[Path]:
    """Checkpoints, whole or not, the most steps first.

    `checkpoint-0` is left out: it is saved before the first step, for `load_best_model_at_end`.
    """
    return [Path(path) for path in reversed(sort_checkpoints(output_dir)) if not path.endswith("-0")]


def mark_whole(folder: str | Path, noted: dict[str, Any]) -> None:
    """Writes `run.json`, with `noted` and a list of all files. Call it when all other files are written."""
    found = dict(_files(Path(folder)))
    mark = {
        **noted,
        "files": {name: path.stat().st_size for name, path in found.items()},
        "checksums": {name: _checksum(path) for name, path in found.items()},
        "written": time.time(),
    }
    with write_whole(Path(folder, MARK)) as file:
        file.write(json.dumps(mark, indent=1).encode())


def read_mark(folder: str | Path) -> dict[str, Any]:
    """`run.json` of a whole checkpoint."""
    return json.loads(Path(folder, MARK).read_text(encoding="utf-8"))


def flaw(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is. Compares names, sizes and checksums of all files."""
    try:
        mark = read_mark(folder)
        noted = {name: (size, mark["checksums"][name]) for name, size in mark["files"].items()}
        if mark["weights_only"]:
            return "it holds weights alone (save_only_model=true)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{MARK} is missing, which is written last"
    except UNREADABLE:
        return f"{MARK} cannot be read, or another version of csdraft wrote it"
    found = dict(_files(folder))
    for name, (size, checksum) in noted.items():
        if name not in found:
            return f"{name} is missing"
        stat = found[name].stat()
        if stat.st_size != size:
            return f"{name} has {stat.st_size:,} of {size:,} bytes"
        if _known_checksum(found[name], size, stat.st_mtime_ns) != checksum:
            return f"{name} is damaged: its checksum differs"
    return None


def _written(folder: Path) -> float:
    """When a checkpoint was completed; 0 if that is not known."""
    try:
        return float(read_mark(folder)["written"])
    except UNREADABLE:
        return 0.0


def _checksum(path: Path) -> str:
    """CRC-32 of a file: fast, and enough to find damage."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


@lru_cache(maxsize=1024)
def _known_checksum(path: Path, size: int, changed: int) -> str:
    """`_checksum` of a file with this size and time, computed once: a run asks for it several times as it begins."""
    return _checksum(path)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name in the folder and path of all files except the mark and hidden ones."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MARK and not path.name.startswith("."):
            yield name, path
