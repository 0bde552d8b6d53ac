"""Checkpoints of a run: which are whole, which is the newest, and with which options it may be continued.

`run.json` is written last and lists every file with its size and checksum. A kill, a full disk or a power failure can
leave a checkpoint without it, or with a file that is missing or differs. Such a checkpoint is skipped: a run resumes
from the newest whole one.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from csdraft.data.shards import check_unchanged, write_whole
from csdraft.trainers.engines import chosen_engine

__all__ = [
    "EVALUATION", "UNREADABLE", "check_options", "chosen_checkpoint", "flaw", "last_checkpoint", "mark_whole",
    "options_of", "passed_over", "read_mark",
]  # fmt: skip

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
                "or leave it out for the newest"
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


# Which options may change when a run is resumed, and why. All others must stay the same.

FREE = {
    "Where results go and what is logged: no weight depends on it.": """
        output_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
        log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
        trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug license
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "How long the run is: the learning rate follows the new length.": """
        max_steps num_train_epochs""",
    "When checkpoints are saved, how many are kept, and where the run continues from.": """
        save_strategy save_steps save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
        resume_from_checkpoint restore_callback_states_from_checkpoint""",
    "How it is evaluated: figures on other prompts are not compared with earlier ones, see `EVALUATION`.": """
        eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps
        eval_do_concat_batches eval_use_gather_object prediction_loss_only include_for_metrics batch_eval_metrics
        bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better eval_prompts
        do_train do_eval do_predict eval_split eval_limit eval_depth eval_new_tokens eval_blocks""",
    "Which devices do the work, and how memory is saved: results are the same up to rounding.": """
        use_cpu threads chunk target_device_map target_sharded tf32 full_determinism torch_compile
        torch_compile_backend torch_compile_mode activation_checkpointing activation_checkpointing_kwargs
        gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
        ddp_static_graph ddp_backend ddp_timeout local_rank accelerator_config parallelism_config fsdp fsdp_config
        deepspeed""",
}
"""Reason -> keys that may change."""

EVALUATION = ("eval_prompts", "eval_split", "eval_limit", "eval_depth", "eval_new_tokens", "eval_blocks",
              "temperature", "metric_for_best_model", "greater_is_better")  # fmt: skip
"""Options that the evaluation figures depend on. If one changes, the best checkpoint so far is forgotten."""

CUTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
"""How a step is divided: only the product must stay the same. Under DeepSpeed and FSDP each number must."""


def options_of(args: TrainingArguments) -> dict[str, Any]:
    """What a checkpoint notes: every option that must not change, the number of processes, and the engine."""
    free = {key for keys in FREE.values() for key in keys.split()}
    kept = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in free}
    engine = chosen_engine(args.deepspeed, args.fsdp)
    plain = {key: json.loads(json.dumps(_name(key, value), default=str)) for key, value in kept.items()}
    return plain | {"processes": args.world_size, "engine": engine}


def check_options(folder: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError if the run in `folder`, a checkpoint or a finished run, was begun with other options."""
    known = all(isinstance(options.get(key), int) for options in (before, now) for key in CUTS)
    if known and before.get("engine") is None and rows_per_step(before) == rows_per_step(now):
        before = {key: value for key, value in before.items() if key not in CUTS}
    check_unchanged(
        f"{folder} holds a run with",
        before,
        now,
        "Resume with the options that it was begun with, give another output_dir, or begin again with "
        "resume_from_checkpoint=false. To train its weights further with other options, start from its folder in "
        "another output_dir",
    )


def rows_per_step(options: dict[str, Any]) -> int:
    """Rows that all processes read in one step."""
    return math.prod(options[key] for key in CUTS)


def _name(key: str, value: Any) -> Any:
    """The last part of an existing path, because folders may be moved; any other value unchanged."""
    # A cache may have been removed. os.path, because Path.exists raises for a long text.
    if isinstance(value, str) and value and (key == "target_cache" or os.path.exists(value)):
        return Path(value).resolve().name
    return value
