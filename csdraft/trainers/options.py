"""Which options may change when a run is resumed, and why. All others must stay the same."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from csdraft.data.shards import check_unchanged
from csdraft.trainers.engines import chosen_engine

__all__ = ["EVALUATION", "check_options", "options_of"]

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
    return _plain(kept) | {"processes": args.world_size, "engine": engine}


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


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON stores them. Only the last part of an existing path is kept, because folders may be moved."""
    return {key: json.loads(json.dumps(_name(key, value), default=str)) for key, value in options.items()}


def _name(key: str, value: Any) -> Any:  # a cache may be gone; a long text is no path, and Path raises
    if isinstance(value, str) and value and (key == "target_cache" or os.path.exists(value)):
        return Path(value).resolve().name
    return value
