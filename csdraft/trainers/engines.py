"""What engines that keep a model in parts ask of the trainer: DeepSpeed's ZeRO-3 and PyTorch's FSDP2.

A student in parts decodes as a whole copy of itself. A target in parts stands in an engine of its own, apart from the
student's: its weights are fetched layer by layer, so every process must run it as often and in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, Trainer
from transformers.integrations import deepspeed

__all__ = ["copy_whole", "is_sharded", "keeps_parts", "load_sharded", "placed_here", "uses", "whole_models"]

ENGINES = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
"""What `accelerate launch` sets for them."""


def uses(engine: str) -> bool:
    """Whether `accelerate launch` has chosen FSDP or DeepSpeed."""
    return os.environ.get(ENGINES[engine], "").lower() in ("1", "true", "yes", "on")


def keeps_parts(trainer: Trainer) -> bool:
    """Whether an engine will keep the student's parameters in parts."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3)


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 keeps a model's parameters in parts."""
    return any("ds_id" in vars(parameter) for parameter in model.parameters())


def placed_here(target: nn.Module) -> bool:
    """Whether it goes to the student's device: nothing else has a say in where its weights are."""
    elsewhere = getattr(target, "hf_device_map", None) is not None or getattr(target, "is_quantized", False)
    return not elsewhere and not is_sharded(target)


@torch.no_grad()
def copy_whole(student: nn.Module, copy: nn.Module) -> None:
    """Puts a student's parameters, whole, into its copy. Every process must call it."""
    parts = list(student.parameters())
    if is_sharded(student):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters(parts):
            _copy(parts, copy)
    else:
        _copy(parts, copy)


def _copy(parts: list[nn.Parameter], copy: nn.Module) -> None:
    for own, part in zip(copy.parameters(), parts, strict=True):
        own.copy_(part.full_tensor() if isinstance(part, DTensor) else part)  # FSDP2's parts are these


@contextmanager
def whole_models() -> Iterator[None]:
    """`from_pretrained` as usual: under a ZeRO-3 config it would cut every model into parts."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def load_sharded(load: Callable[[], Any], config: PreTrainedConfig, dtype: str) -> Any:
    """A model for inference whose parameters are spread over all processes, and never whole on any.

    Args:
        load: calls `from_pretrained`.
        config: the model's.
        dtype: of its weights; 'auto' is the config's.
    """
    import deepspeed as engine  # type: ignore[import-not-found]

    kind = config.dtype if dtype == "auto" else getattr(torch, dtype)
    width = config.get_text_config(decoder=True).hidden_size
    options = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and without meaning here
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10 * width},  # norms stay whole
        "bf16": {"enabled": kind == torch.bfloat16},
        "fp16": {"enabled": kind == torch.float16},
    }
    with whole_models():
        chosen = deepspeed.HfDeepSpeedConfig(options)  # as long as this lives, models are loaded in parts
        model = load().eval().requires_grad_(False)
        del chosen
        deepspeed.unset_hf_deepspeed_config()
    # Beside the modules, since it is one and holds the model: both live as long as each other.
    vars(model)["inference_engine"] = engine.initialize(model=model, config=options)[0]
    return model
