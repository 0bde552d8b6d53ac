"""Checkpoints of a run: which are whole, which is the newest, and what a whole one notes in its `run.json`.

`run.json` is written last and lists every file with its size. A checkpoint without it, or with a file that is missing,
of another size or unreadable, was cut short by a kill or a full disk: it is passed over.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from csdraft.data.shards import write_whole

__all__ = ["Resumable", "chosen_checkpoint", "flaw", "last_checkpoint", "mark_whole", "passed_over", "read_mark"]

MARK, STATE = "run.json", "trainer_state.json"
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
        if reason := flaw(Path(named)):
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
    return max(map(str, whole), key=lambda folder: (read_mark(folder)["written"], _step(Path(folder))), default=None)


def passed_over(output_dir: str) -> dict[str, str]:
    """Why checkpoints that are newer than the newest whole one are not whole, by name; of none whole, all."""
    newest = last_checkpoint(output_dir)
    after = _step(Path(newest)) if newest is not None else -1
    found = {folder.name: flaw(folder) for folder in _folders(output_dir) if _step(folder) > after}
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
    files = {name: path.stat().st_size for name, path in _files(folder)}
    with write_whole(folder / MARK) as file:
        file.write(json.dumps({**noted, "files": files, "written": time.time()}, indent=1).encode())


def read_mark(folder: str | Path) -> dict[str, Any]:
    """`run.json` of a whole checkpoint."""
    return json.loads(Path(folder, MARK).read_text(encoding="utf-8"))


def flaw(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is."""
    if not (folder / MARK).is_file():
        return f"{MARK} is missing, which is written last"
    try:
        mark = read_mark(folder)
        files, _ = mark["files"], mark["written"]
    except (ValueError, KeyError):
        return f"{MARK} cannot be read"
    if mark.get("weights_only"):
        return "it holds weights alone (save_only_model=true)"
    if STATE not in files:
        return f"{STATE} is missing"
    found = dict(_files(folder))
    for name, size in files.items():
        if name not in found:
            return f"{name} is missing"
        if (now := found[name].stat().st_size) != size:
            return f"{name} has {now:,} of {size:,} bytes"
        if not _readable(found[name]):
            return f"{name} cannot be read"
    return None


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
