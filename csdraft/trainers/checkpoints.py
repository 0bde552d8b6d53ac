"""Which checkpoint a run goes on from, and whether it is one of the same student: asked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from csdraft.trainers.pretrain import last_checkpoint

__all__ = ["MadeFrom", "check_student_of", "chosen_checkpoint", "note_student"]

DOCUMENT = "student.json"
KEYS = ("student", "init", "peft")


class MadeFrom(Protocol):
    """Arguments that say how a student is made, and where its run is."""

    student: Any
    init: dict | None
    peft: dict | None
    output_dir: str | None
    resume_from_checkpoint: Any


def chosen_checkpoint(args: MadeFrom) -> str | None:
    """The folder that `resume_from_checkpoint` names; the newest whole one of `output_dir`, unless it is false.

    Raises:
        ValueError: the folder holds no whole checkpoint.
    """
    chosen = args.resume_from_checkpoint
    if chosen is None or chosen is True:
        return last_checkpoint(args.output_dir or "")
    if chosen is False:
        return None
    if not Path(chosen, "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={chosen!r} holds no whole checkpoint (no trainer_state.json); name a folder "
            "checkpoint-N, or leave it out for the newest of output_dir"
        )
    return str(chosen)


def note_student(args: MadeFrom, folder: str) -> None:
    """Writes down beside a checkpoint's weights how its student was made."""
    Path(folder, DOCUMENT).write_text(json.dumps(_of(args), indent=2) + "\n", encoding="utf-8")


def check_student_of(args: MadeFrom) -> None:
    """Raises ValueError if the checkpoint to go on from is of a student that was made otherwise.

    Of a folder only the last part of its path counts, since runs are moved; weights of another shape are refused when
    they are loaded.
    """
    folder = chosen_checkpoint(args)
    if folder is None or not (path := Path(folder, DOCUMENT)).is_file():
        return
    stored, own = json.loads(path.read_text(encoding="utf-8")), _of(args)
    for key in KEYS:
        if stored.get(key) != own[key]:
            raise ValueError(
                f"{folder} holds another student: {key} was {stored.get(key)!r} there and is {own[key]!r} here; "
                "resume with the options it was trained with, or give another output_dir"
            )


def _of(args: MadeFrom) -> dict[str, Any]:
    plain = {key: getattr(args, key) for key in KEYS}
    if args.student is not None and Path(args.student).is_dir():
        plain["student"] = Path(args.student).resolve().name
    return json.loads(json.dumps(plain, default=str))
