"""Engines that shard a model: DeepSpeed's ZeRO-3 and PyTorch's FSDP2.

A sharded student decodes through a whole copy of itself. A sharded target has an engine of its own: its weights are
fetched layer by layer, so all processes must run it equally often and in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, Trainer
from transformers.integrations import deepspeed

__all__ = [
    "check_engine", "chosen_engine", "copy_whole", "is_sharded", "keeps_parts", "load_sharded", "placed_here", "uses",
    "whole_models",
]  # fmt: skip

ENGINES = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
"""Engine -> the variable that `accelerate launch` sets for it."""


def uses(engine: str) -> bool:
    """Whether `accelerate launch` has chosen this engine, FSDP or DeepSpeed."""
    return os.environ.get(ENGINES[engine], "").lower() in ("1", "true", "yes", "on")


def chosen_engine(deepspeed: Any = None, fsdp: Any = None) -> str | None:
    """The engine that `TrainingArguments.deepspeed` and `fsdp`, or `accelerate launch`, have chosen; None if none."""
    asked = {"DeepSpeed": deepspeed, "FSDP": fsdp}
    return next((engine for engine in asked if asked[engine] or uses(engine)), None)


def check_engine(shared: bool, deepspeed: Any = None, fsdp: Any = None) -> None:
    """Raises ValueError if a student with the target's own layers would be trained by an engine that shards it.

    Args:
        shared: whether the student has the target's own layers.
        deepspeed, fsdp: of `TrainingArguments`. The choice of `accelerate launch` is read from the environment.
    """
    if shared and (engine := chosen_engine(deepspeed, fsdp)):
        raise ValueError(
            f"a self-drafting student cannot be trained under {engine}: its layers are the target's own tensors, "
            "which the engine (ZeRO, FSDP) would shard or move as the student's. Use DDP or one process, or give "
            "the student layers of its own: init: {from_target: {layers: [...]}}"
        )


def keeps_parts(trainer: Trainer) -> bool:
    """Whether an engine will shard the student's parameters."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3)


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 shards a model's parameters."""
    return any("ds_id" in vars(parameter) for parameter in model.parameters())


def placed_here(target: nn.Module) -> bool:
    """Whether the target can be moved to the student's device: it is not mapped, quantised or sharded."""
    mapped = getattr(target, "hf_device_map", None) is not None
    return not mapped and not getattr(target, "is_quantized", False) and not is_sharded(target)


@torch.no_grad()
def copy_whole(student: nn.Module, copy: nn.Module) -> None:
    """Copies a sharded student's whole parameters into `copy`. Every process must call it."""
    parts = list(student.parameters())
    gathered: Any = nullcontext()
    if is_sharded(student):
        import deepspeed  # type: ignore[import-not-found]

        gathered = deepspeed.zero.GatheredParameters(parts)
    with gathered:
        for own, part in zip(copy.parameters(), parts, strict=True):
            own.copy_(part.full_tensor() if isinstance(part, DTensor) else part)  # FSDP2 keeps DTensors


@contextmanager
def whole_models() -> Iterator[None]:
    """Lets `from_pretrained` load whole models: under a ZeRO-3 config it would shard every one."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def load_sharded(load: Callable[[], Any], config: PreTrainedConfig, dtype: str) -> Any:
    """The model that `load` gets by `from_pretrained`, for inference: sharded, and never whole on any process."""
    import deepspeed as engine  # type: ignore[import-not-found]

    kind = config.dtype if dtype == "auto" else getattr(torch, dtype)
    width = config.get_text_config(decoder=True).hidden_size
    options = {
        "train_micro_batch_size_per_gpu": 1,  # required, without effect here
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10 * width},  # norms stay whole
        "bf16": {"enabled": kind == torch.bfloat16},
        "fp16": {"enabled": kind == torch.float16},
    }
    with whole_models():
        chosen = deepspeed.HfDeepSpeedConfig(options)  # while this object lives, models are loaded sharded
        model = load().eval().requires_grad_(False)
        del chosen
        deepspeed.unset_hf_deepspeed_config()
    # Kept outside the modules: the engine is a module that holds the model.
    vars(model)["inference_engine"] = engine.initialize(model=model, config=options)[0]
    return model
