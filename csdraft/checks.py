"""Everything that is refused, before any model runs: each message names the value, the expectation and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from csdraft.decoding.cache import holds
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.interfaces import Verifier
from csdraft.decoding.runner import refusal
from csdraft.decoding.sampling import Processing

__all__ = ["check_processors", "check_request"]

KNOWN_INPUTS = {
    "attention_mask",
    "position_ids",
    GENERATE_CACHE,
    "use_cache",
    "logits_to_keep",
    "encoder_outputs",
    "decoder_attention_mask",
}


def check_request(
    model: Any,
    input_ids: Tensor,
    config: Any,
    inputs: dict[str, Any],
    criteria: Sequence[Any],
    streamer: Any,
    synced_gpus: bool,
    row_seeds: Sequence[int] | None,
) -> None:
    """Raises ValueError for a request that cannot be decoded exactly with drafts.

    Args:
        inputs: what `generate` would pass to the model's forward.
        criteria: the stopping criteria that `generate` prepared.
    """
    _check_model(model)
    _check_mode(config)
    _check_inputs(model, input_ids, inputs)
    _check_rows(input_ids.shape[0], config, criteria, streamer, synced_gpus, row_seeds)
    _check_mask(model, input_ids, inputs)
    _check_cache(input_ids, config, inputs.get(GENERATE_CACHE))
    _check_positions(model, input_ids, inputs)


def _check_model(model: Any) -> None:
    if reason := refusal(model):
        raise ValueError(reason)
    if getattr(model.prepare_inputs_for_generation, "__self__", model) is not model:  # PEFT has put its own in place
        raise ValueError(
            f"{type(model).__name__} runs under a prompt-learning PEFT adapter, whose virtual tokens drafted decoding "
            "would not see; use an adapter on the weights (such as LoRA), or leave assistant= out"
        )


def _check_mode(config: Any) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generation mode {mode.value!r} cannot be drafted for: csdraft reproduces greedy search and sampling "
            "(num_beams=1, no constraints); leave assistant= out for other modes"
        )
    if not config.use_cache:
        raise ValueError("use_cache=False leaves nothing to speed up: csdraft keeps its own KV cache; drop the flag")
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "output_attentions and output_hidden_states are not kept by drafted decoding; ask plain generate for them"
        )
    if config.cache_implementation not in (None, "dynamic", "hybrid"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} is not used: csdraft brings its own preallocated "
            "cache; drop the flag"
        )


def _check_inputs(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> None:
    given = {key for key, value in inputs.items() if value is not None}
    types = inputs.get("token_type_ids")
    if types is not None and not bool(types.any()) and model.config.model_type.startswith("gemma"):
        given.discard("token_type_ids")  # no images: the ordinary causal mask
    if unknown := given - KNOWN_INPUTS:
        raise ValueError(
            f"inputs {sorted(unknown)} are not supported with assistant=: csdraft decodes text from input_ids and an "
            "attention_mask (images, audio and inputs_embeds not yet); leave assistant= out for them"
        )
    if input_ids.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token, such as the tokenizer's bos_token")


def _check_positions(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> None:
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or model.config.is_encoder_decoder:
        return
    mask = (torch.ones_like(input_ids) if mask is None else mask).to(positions.device)
    width = min(positions.shape[-1], mask.shape[1])
    usual, counts = (mask.long().cumsum(-1) - 1)[:, -width:], mask[:, -width:].bool()
    if positions.dim() != 2 or bool(((positions[:, -width:] != usual) & counts).any()):
        raise ValueError(
            f"position_ids of shape {tuple(positions.shape)} are not 0, 1, 2, ... along each row's tokens, as "
            "drafted decoding counts them; drop them, or leave assistant= out"
        )


def _check_rows(
    rows: int, config: Any, criteria: Sequence[Any], streamer: Any, synced_gpus: bool, row_seeds: Sequence[int] | None
) -> None:
    if synced_gpus:
        raise ValueError(
            "synced_gpus=True (ZeRO-3 or FSDP with several processes) is not supported: ranks would run different "
            "numbers of forwards; gather the parameters first"
        )
    if streamer is not None and rows > 1:
        raise ValueError(f"a streamer takes one row, this batch has {rows}; generate row by row or drop the streamer")
    if row_seeds is not None and len(row_seeds) != rows:
        raise ValueError(f"row_seeds has {len(row_seeds)} seeds for {rows} rows (num_return_sequences counted)")
    alike = all(type(criterion) in (MaxLengthCriteria, MaxTimeCriteria) for criterion in criteria)
    if rows > 1 and not alike and config._pad_token_tensor is None:
        raise ValueError(
            f"pad_token_id is None, but {rows} rows may end at different lengths; set pad_token_id, such as to the "
            "tokenizer's pad or end-of-text token"
        )


def _check_mask(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> None:
    encoder_decoder = model.config.is_encoder_decoder
    mask = inputs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if mask is None:
        return
    if tuple(mask.shape) != tuple(input_ids.shape):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; they must agree "
            "(when continuing a cache, pass the whole text and its whole mask)"
        )
    holes = (mask.bool()[:, :-1] & ~mask.bool()[:, 1:]).any(1)
    text = model.config.get_text_config(decoder=True)
    if bool(holes.any()) and bool(mask[:, -1].all()) and (encoder_decoder or getattr(text, "sliding_window", None)):
        raise ValueError(
            f"row {int(holes.nonzero()[0])} has masked tokens between others, across which {type(model).__name__} "
            "measures distances differently; leave them out and pad on the left"
        )
    ends = mask[:, -1].bool()
    if not bool(ends.all()):
        row = int((~ends).nonzero()[0])
        raise ValueError(
            f"row {row} is padded on the right (its attention_mask ends in 0); generation goes on from the last "
            "token, so pad on the left: tokenizer.padding_side = 'left'"
        )


def _check_cache(input_ids: Tensor, config: Any, cache: Any) -> None:
    if cache is None or not getattr(cache, "_is_user_defined", False):
        return
    if not holds(cache):
        raise ValueError(
            f"{GENERATE_CACHE} is a {type(cache).__name__} whose layers cannot be taken over; pass a DynamicCache (or "
            "an EncoderDecoderCache of them), or none"
        )
    seen, length = cache.get_seq_length(), input_ids.shape[1]
    if seen and (seen >= length or getattr(config, "_mask_length", length) != length):
        raise ValueError(
            f"{GENERATE_CACHE} holds {seen} tokens and input_ids has {length}: pass the whole text, the cached part "
            "included, and at least one token more (drafters read it too)"
        )


def check_processors(verifier: Verifier, processing: Processing) -> None:
    """Raises ValueError if a rule would show a stateful logits processor tokens that are never emitted."""
    if verifier.looks_ahead and processing.stateful:
        names = ", ".join(type(processor).__name__ for processor in processing.stateful)
        raise ValueError(
            f"verifier {type(verifier).__name__} asks for laws beyond the accepted tokens, but {names} may keep state "
            "from call to call; use verifier='match' or 'rejection', which call processors once an emitted token"
        )
