"""Checkpoints of a run: which are whole, which is the newest, and what a whole one notes in its `run.json`.

`run.json` is written last and lists every file with its size and checksum. A checkpoint without it, or with a file
that is missing, unreadable, or of another size or checksum, was cut short by a kill, a full disk or a power failure:
it is passed over. Checksums take a read of every file, so only those of the checkpoint to resume from are compared.
"""

from __future__ import annotations

import json
import time
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from csdraft.data.shards import write_whole

__all__ = [
    "Resumable",
    "chosen_checkpoint",
    "damage",
    "flaw",
    "has_checkpoint",
    "last_checkpoint",
    "mark_whole",
    "passed_over",
    "read_mark",
]

MARK, STATE = "run.json", "trainer_state.json"
NOTED = {"files": dict, "written": int | float, "options": dict, "unlogged": list, "evaluation": dict}
"""What every `run.json` has, and of which kind."""
BLOCK = 1 << 22
"""Bytes that are read at once for a checksum."""
BEGIN_AGAIN = "begin again with resume_from_checkpoint=false"


class Resumable(Protocol):
    """Arguments of a training."""

    output_dir: str | None
    resume_from_checkpoint: Any


def chosen_checkpoint(args: Resumable) -> str | None:
    """The folder that `resume_from_checkpoint` names; the newest whole one of `output_dir`, unless it is false.

    Raises:
        ValueError: the named folder holds no whole checkpoint, or `output_dir` has checkpoints and none is whole.
    """
    named = args.resume_from_checkpoint
    if named is False:
        return None
    if named is not None and named is not True:
        if reason := flaw(Path(named)) or damage(Path(named)):
            raise ValueError(
                f"resume_from_checkpoint={named!r} holds no whole checkpoint: {reason}. Name a folder checkpoint-N, "
                "or leave it out for the newest of output_dir"
            )
        return str(named)
    newest, broken = last_checkpoint(args.output_dir or ""), passed_over(args.output_dir or "")
    if newest is None and broken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        raise ValueError(
            f"{args.output_dir} has no whole checkpoint to resume from ({reasons}). Give another output_dir, or "
            f"{BEGIN_AGAIN}"
        )
    return newest


def last_checkpoint(output_dir: str) -> str | None:
    """The whole checkpoint that was written last; None if there is none.

    Not the one with the most steps: a run that was begun again in its folder has fewer than the one before. What is
    saved before the first step (`checkpoint-0`, for `load_best_model_at_end`) is no place to resume from.
    """
    whole = [folder for folder in _folders(output_dir) if flaw(folder) is None]
    whole.sort(key=lambda folder: (read_mark(folder)["written"], _step(folder)), reverse=True)
    return next((str(folder) for folder in whole if damage(folder) is None), None)


def has_checkpoint(output_dir: str) -> bool:
    """Whether there is one to resume from, as far as sizes tell."""
    return any(flaw(folder) is None for folder in _folders(output_dir))


def passed_over(output_dir: str) -> dict[str, str]:
    """Why checkpoints that are newer than the newest whole one are not whole, by name; of none whole, all."""
    newest = last_checkpoint(output_dir)
    after = _step(Path(newest)) if newest is not None else -1
    later = [folder for folder in _folders(output_dir) if _step(folder) > after]
    found = {folder.name: flaw(folder) or damage(folder) for folder in later}
    return {name: reason for name, reason in found.items() if reason is not None}


def _folders(output_dir: str) -> list[Path]:
    """Checkpoints to resume from, whole or not, those with the most steps first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _step(path) > 0]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


# Whole or not.


def mark_whole(folder: str | Path, noted: dict[str, Any]) -> None:
    """Writes `run.json`: what is `noted` of the run, and all files that are there, which must be all that will be."""
    folder = Path(folder)
    found = dict(_files(folder))
    files = {name: path.stat().st_size for name, path in found.items()}
    checksums = {name: _checksum(path) for name, path in found.items()}
    mark = {**noted, "files": files, "checksums": checksums, "written": time.time()}
    with write_whole(folder / MARK) as file:
        file.write(json.dumps(mark, indent=1).encode())


def read_mark(folder: str | Path) -> dict[str, Any]:
    """`run.json` of a whole checkpoint."""
    return json.loads(Path(folder, MARK).read_text(encoding="utf-8"))


def flaw(folder: Path) -> str | None:
    """Why a checkpoint is not whole, as far as names, sizes and beginnings of files tell; None if it is."""
    if not (folder / MARK).is_file():
        return f"{MARK} is missing, which is written last"
    try:
        mark = read_mark(folder)
    except (ValueError, OSError):
        return f"{MARK} cannot be read"
    if reason := _odd(mark):
        return f"{MARK} {reason}"
    if mark.get("weights_only"):
        return "it holds weights alone (save_only_model=true)"
    if STATE not in mark["files"]:
        return f"{STATE} is missing"
    found = dict(_files(folder))
    for name, size in mark["files"].items():
        if name not in found:
            return f"{name} is missing"
        if (now := found[name].stat().st_size) != size:
            return f"{name} has {now:,} of {size:,} bytes"
        if not _readable(found[name]):
            return f"{name} cannot be read"
    return None


def damage(folder: Path) -> str | None:
    """Which file of a checkpoint without a flaw has other content than when it was written; None if there is none.

    Reads every file once. Checkpoints of older versions note no checksums: they are taken as they are.
    """
    noted = read_mark(folder).get("checksums", {})
    for name, path in _files(folder):
        if name in noted and noted[name] != _known_checksum(path, path.stat().st_size, path.stat().st_mtime_ns):
            return f"{name} is damaged: its checksum differs"
    return None


def _odd(mark: Any) -> str | None:
    """What is wrong with the content of a `run.json`; None if nothing is."""
    if not isinstance(mark, dict):
        return "holds no object of JSON"
    for key, kind in NOTED.items():
        if key not in mark:
            return f"lacks {key!r}"
        if not isinstance(mark[key], kind):
            return f"has {key!r} of another kind"
    sizes, checksums = mark["files"].values(), mark.get("checksums", {})
    if not all(isinstance(size, int) for size in sizes) or not isinstance(checksums, dict):
        return "has files of another kind"
    if len(mark["unlogged"]) != 2 or not isinstance(mark.get("data", {}), dict):
        return "has notes of another kind"
    return None


def _checksum(path: Path) -> str:
    """CRC-32 of a file's content: it is to find damage, not forgery, and is the fastest."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


@lru_cache(maxsize=1024)
def _known_checksum(path: Path, size: int, changed: int) -> str:
    """`_checksum` of a file of this size and time, read once: a run is looked at several times as it begins."""
    return _checksum(path)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files but the mark, by their path in the folder."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MARK and not path.name.startswith("."):
            yield name, path


def _readable(path: Path) -> bool:
    """Whether a file is what its name says, as far as its ends and its table of contents tell."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return True
        except (SafetensorError, OSError):
            return False
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return path.suffix not in (".pt", ".pth") or zipfile.is_zipfile(path)
