"""Everything that is refused, before any model runs: each message names the value, the expectation and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from csdraft.decoding.interfaces import Verifier
from csdraft.decoding.runner import refusal

__all__ = ["check_request"]

KNOWN_INPUTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "encoder_outputs",
    "decoder_attention_mask",
    "token_type_ids",
}


def check_request(
    model: Any,
    input_ids: Tensor,
    config: Any,
    inputs: dict[str, Any],
    streamer: Any,
    synced_gpus: bool,
    row_seeds: Sequence[int] | None,
    verifier: Verifier,
) -> None:
    """Raises ValueError for a request that cannot be decoded exactly with drafts.

    Args:
        inputs: what `generate` would pass to the model's forward.
    """
    rows, length = input_ids.shape
    if reason := refusal(model):
        raise ValueError(reason)
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generation mode {mode.value!r} cannot be drafted for: csdraft reproduces greedy search and sampling "
            "(num_beams=1, no constraints); leave assistant= out for other modes"
        )
    if not config.use_cache:
        raise ValueError("use_cache=False leaves nothing to speed up: csdraft keeps its own KV cache; drop the flag")
    if length == 0 or input_ids.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token, such as the tokenizer's bos_token")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "output_attentions and output_hidden_states are not kept by drafted decoding; ask plain generate for them"
        )
    if config.cache_implementation not in (None, "dynamic", "hybrid"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} is not used: csdraft brings its own preallocated "
            "cache; drop the flag"
        )
    if synced_gpus:
        raise ValueError(
            "synced_gpus=True (ZeRO-3 or FSDP with several processes) is not supported: ranks would run different "
            "numbers of forwards; gather the parameters first"
        )
    if streamer is not None and rows > 1:
        raise ValueError(f"a streamer takes one row, this batch has {rows}; generate row by row or drop the streamer")
    if row_seeds is not None and len(row_seeds) != rows:
        raise ValueError(f"row_seeds has {len(row_seeds)} seeds for {rows} rows (num_return_sequences counted)")
    unknown = {key for key, value in inputs.items() if value is not None} - KNOWN_INPUTS
    if unknown:
        raise ValueError(
            f"inputs {sorted(unknown)} are not supported with assistant=: csdraft decodes text from input_ids and an "
            "attention_mask (images, audio and inputs_embeds not yet); leave assistant= out for them"
        )
    _check_mask(model, input_ids, inputs)


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
    ends = mask[:, -1].bool()
    if not bool(ends.all()):
        row = int((~ends).nonzero()[0])
        raise ValueError(
            f"row {row} is padded on the right (its attention_mask ends in 0); generation goes on from the last "
            "token, so pad on the left: tokenizer.padding_side = 'left'"
        )
