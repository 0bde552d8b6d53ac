"""A new model with random weights and any config, with the target's vocabulary and special tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from csdraft import spec
from csdraft.trainers.students._student import Counts, Student

__all__ = ["Scratch", "new_config"]


FROM_TARGET = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
LONGEST = 2048
"""Context of a new model if the target's config has none."""


class Scratch(Student):
    """See `Student`."""

    rate = 3e-4

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        new_config(config, options)

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        config = new_config(target.config, options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        student = auto.from_config(config, dtype=torch.float32)
        student.generation_config = copy.deepcopy(target.generation_config)
        return student


def new_config(config: Any, options: Mapping[str, Any]) -> Any:
    """A config with these options, and the target's vocabulary and special tokens.

    Args:
        options: `model_type` (default: the target's), and options of a config of that type.
    """
    options = dict(options)
    kind = options.pop("model_type", config.model_type)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type {kind!r} is unknown to transformers: {spec.nearest(kind, CONFIG_MAPPING)[:400]}")
    made = CONFIG_MAPPING[kind]
    own = {field.name for field in fields(made)} | {key for key in vars(made()) if key[0] != "_"}
    spec.check_keys(options, sorted((own | set(made.attribute_map)) - set(FROM_TARGET)), f"init.config ({kind})")
    text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    # Also those that are None: the class's default ids are other tokens.
    given = {key: getattr(text, key, None) for key in FROM_TARGET}
    if "max_position_embeddings" in own:
        given["max_position_embeddings"] = getattr(text, "max_position_embeddings", None) or LONGEST
    try:
        result = made(**(given | options))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"init.config: {' '.join(str(error).split())}") from error
    if result.is_encoder_decoder != config.is_encoder_decoder:
        raise ValueError(
            f"init.config: {kind!r} is {'an encoder-decoder' if result.is_encoder_decoder else 'decoder-only'}, the "
            f"target {config.model_type!r} is not; both must be alike"
        )
    return result
