"""Checks a request before any model runs. Each error names the value, what is expected, and a way out."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from csdraft.checks.generate_options import check_options
from csdraft.checks.probe import difference, padding_difference
from csdraft.checks.refusals import refusal
from csdraft.decoding.cache import holds, slots_of
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.interfaces import Verifier
from csdraft.decoding.processing import Processing
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.traits import traits_of
from csdraft.stored import kind_of

__all__ = ["ask_model", "check_processors", "check_request"]

KNOWN_INPUTS = {
    *("attention_mask", "position_ids", GENERATE_CACHE, "use_cache", "logits_to_keep", "encoder_outputs"),
    *("decoder_attention_mask", "output_attentions", "output_hidden_states"),  # the last two are options, too
}
NOT_CALLED = ("_sample", "_prefill", "_update_model_kwargs_for_generation")
"""Methods of a model that plain `generate` decodes with."""


def check_request(
    model: Any,
    input_ids: Tensor,
    config: Any,
    inputs: Mapping[str, Any],
    given: Collection[str] | None,
    criteria: Sequence[Any],
    streamer: Any,
    synced_gpus: bool,
    row_seeds: Sequence[int] | None,
) -> None:
    """Raises ValueError for a request that cannot be decoded exactly with drafts.

    Args:
        inputs: what `generate` would pass to the model's forward.
        given: the keywords that the user passed to `generate`; None if unknown.
        criteria: the stopping criteria that `generate` prepared.
    """
    _check_model(model)
    check_options(config)
    _check_inputs(model, input_ids, inputs, given)
    _check_length(model, input_ids, config)
    _check_rows(input_ids.shape[0], config, criteria, streamer, synced_gpus, row_seeds)
    _check_mask(model, input_ids, config, inputs)
    _check_cache(model, input_ids, config, inputs.get(GENERATE_CACHE))
    _check_positions(model, input_ids, inputs)


def _check_model(model: Any) -> None:
    if reason := refusal(model):
        raise ValueError(reason)
    if getattr(model.prepare_inputs_for_generation, "__self__", model) is not model:  # PEFT has replaced it
        raise ValueError(
            f"{type(model).__name__} has a prompt-learning PEFT adapter, whose virtual tokens drafted decoding would "
            "not see; use an adapter on the weights (such as LoRA), or leave assistant= out"
        )
    for name in NOT_CALLED:
        if not getattr(model, name).__module__.startswith("transformers."):
            raise ValueError(
                f"{type(model).__name__} has a {name} of its own, which plain generate calls and drafted decoding "
                "does not; leave assistant= out"
            )


def ask_model(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError if short forwards show that drafts would change the model's text. It is the last check."""
    mask = inputs.get("attention_mask")
    padded = not model.config.is_encoder_decoder and mask is not None and not bool(mask.all())
    if reason := difference(model) or (padding_difference(model) if padded else None):
        raise ValueError(reason)


def _check_inputs(model: Any, input_ids: Tensor, inputs: Mapping[str, Any], given: Collection[str] | None) -> None:
    """Refuses inputs besides the text, except those that `generate` adds and leaves empty."""
    zeros_pass = {"mm_token_type_ids"} | ({"token_type_ids"} if model.config.model_type.startswith("gemma") else set())
    for key, value in inputs.items():
        if key in KNOWN_INPUTS or _is_empty(value, zeros=key in zeros_pass):
            continue
        takes = inspect.signature(model.forward).parameters.keys() - KNOWN_INPUTS - {"input_ids"}
        passed = sorted(takes & set(given or ())) or ([key] if given is None else [])
        source = f"comes from {', '.join(passed)}, passed to generate" if passed else "is added by generate"
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
        raise ValueError(
            f"{type(model).__name__}'s input {key} ({kind}) {source}; csdraft decodes text from input_ids and an "
            "attention_mask (images, audio and inputs_embeds not yet): leave assistant= out"
        )
    if input_ids.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token, such as the tokenizer's bos_token")


def _is_empty(value: Any, zeros: bool) -> bool:
    """Whether an input has no content. `zeros`: zeros are no content, as in token types that tell images from text."""
    if value is None or value is False:
        return True
    if isinstance(value, Tensor):
        return value.numel() == 0 or (zeros and not bool(value.any()))
    return isinstance(value, Sized) and len(value) == 0


def _check_length(model: Any, input_ids: Tensor, config: Any) -> None:
    """Refuses long texts for models whose computation changes above some length."""
    switch, text = traits_of(model).switch, model.config.get_text_config(decoder=True)
    name, longest = type(model).__name__, max(config.max_length or 0, input_ids.shape[1])
    scale = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", False) else None
    if scale is not None and longest >= scale:
        raise ValueError(
            f"{name} scales its attention by slots of the cache from {scale} tokens on (floor_scale), but this text "
            f"may reach {longest}: give at most max_length={scale - 1:.0f}, or leave assistant= out"
        )
    if switch is not None and switch.every_token and longest > switch.length:
        raise ValueError(
            f"{name} changes its rotary factors with every token past {switch.length} (dynamic NTK), and they depend "
            f"on earlier calls, but this text may reach {longest} tokens: give at most max_length={switch.length}, or "
            "leave assistant= out"
        )
    if config.prefill_chunk_size is not None and (switch is not None or model.config.is_encoder_decoder):
        what = "rotary factors" if switch is not None else "encoder's mask"
        raise ValueError(
            f"prefill_chunk_size={config.prefill_chunk_size} changes the {what} that {name} reads a prompt with; "
            "unset it, or leave assistant= out"
        )


def _check_positions(model: Any, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or model.config.is_encoder_decoder:
        return
    mask = (torch.ones_like(input_ids) if mask is None else mask).to(positions.device)
    width = min(positions.shape[-1], mask.shape[1])
    usual, counts = (mask.long().cumsum(-1) - 1)[:, -width:], mask[:, -width:].bool()
    if bool(((positions[..., -width:] != usual) & counts).any()):  # M-RoPE has a row for each axis; for text all agree
        raise ValueError(
            f"position_ids of shape {tuple(positions.shape)} are not 0, 1, 2, ... along each row's tokens, as "
            "drafted decoding counts them; drop them, or leave assistant= out"
        )


def _check_rows(
    rows: int, config: Any, criteria: Sequence[Any], streamer: Any, synced_gpus: bool, row_seeds: Sequence[int] | None
) -> None:
    if synced_gpus:
        raise ValueError(
            "synced_gpus=True (ZeRO-3 or FSDP with several processes) is not supported: processes would run different "
            "numbers of forwards; gather the parameters first"
        )
    if streamer is not None and rows > 1:
        raise ValueError(f"a streamer takes one row, this batch has {rows}; generate row by row or drop the streamer")
    if row_seeds is not None and len(row_seeds) != rows:
        raise ValueError(f"row_seeds has {len(row_seeds)} seeds for {rows} rows (num_return_sequences counted)")
    if rows > 1 and Stopping(criteria).pads and config._pad_token_tensor is None:
        raise ValueError(
            f"pad_token_id is None, but {rows} rows may end at different lengths; set pad_token_id, such as to the "
            "tokenizer's pad or end-of-text token"
        )


def _check_mask(model: Any, input_ids: Tensor, config: Any, inputs: Mapping[str, Any]) -> None:
    encoder_decoder, (rows, length) = model.config.is_encoder_decoder, input_ids.shape
    mask = inputs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    cache = inputs.get(GENERATE_CACHE)
    given = tuple(mask.shape) if mask is not None else (rows, getattr(config, "_mask_length", length))  # ones: dropped
    if given != (rows, length) and (mask is not None or cache is None or not cache.get_seq_length()):
        raise ValueError(
            f"attention_mask has shape {given}, input_ids {(rows, length)}; they must agree "
            "(when continuing a cache, pass the whole text and its whole mask)"
        )
    if mask is None:
        return
    if odd := sorted(set(mask.unique().tolist()) - {0, 1}):
        raise ValueError(f"attention_mask has the value {odd[0]}; give 1 where a token counts, and 0 elsewhere")
    holes = (mask.bool()[:, :-1] & ~mask.bool()[:, 1:]).any(1)
    text = model.config.get_text_config(decoder=True)
    if bool(holes.any()) and bool(mask[:, -1].all()) and (encoder_decoder or getattr(text, "sliding_window", None)):
        raise ValueError(
            f"row {int(holes.nonzero()[0])} has masked tokens between others, and {type(model).__name__} counts them "
            "when it measures distances; leave them out and pad on the left"
        )
    ends = mask[:, -1].bool()
    if not bool(ends.all()):
        row = int((~ends).nonzero()[0])
        if not bool(mask[row].any()):
            raise ValueError(f"row {row}'s attention_mask has no 1: give it at least one token, or leave the row out")
        raise ValueError(
            f"row {row} is padded on the right (its attention_mask ends in 0); generation continues from the last "
            "token, so pad on the left: tokenizer.padding_side = 'left'"
        )


def _check_cache(model: Any, input_ids: Tensor, config: Any, cache: Any) -> None:
    if cache is None or not getattr(cache, "_is_user_defined", False):
        return
    if not holds(cache):
        raise ValueError(
            f"{GENERATE_CACHE} is {kind_of(cache)} whose layers csdraft cannot read; pass a DynamicCache, a "
            "StaticCache, an EncoderDecoderCache of these, or none"
        )
    slots = slots_of(cache, getattr(model.config.get_text_config(decoder=True), "sliding_window", None))
    if slots is not None and slots < config.max_length - 1:
        raise ValueError(
            f"{GENERATE_CACHE} has max_cache_len={slots}, but the text may have {config.max_length} tokens, and all "
            f"but the last are cached; give it max_cache_len={config.max_length - 1}"
        )
    seen, length = int(cache.get_seq_length()), input_ids.shape[1]
    if seen and (seen >= length or getattr(config, "_mask_length", length) != length):
        raise ValueError(
            f"{GENERATE_CACHE} holds {seen} tokens and input_ids has {length}: pass the whole text with the cached "
            "part, which drafters read too, and at least one more token"
        )


def check_processors(verifier: Verifier, processing: Processing) -> None:
    """Raises ValueError if the verifier would call a stateful logits processor with tokens that are never emitted."""
    if verifier.looks_ahead and processing.stateful:
        names = ", ".join(type(processor).__name__ for processor in processing.stateful)
        raise ValueError(
            f"verifier {type(verifier).__name__} needs distributions after tokens that it may reject, but {names} may "
            "keep state from call to call; use verifier='match' or 'rejection', which call processors once per token"
        )
