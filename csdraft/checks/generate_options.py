"""What happens to each option of `generate` with `assistant=`: it works as usual, has no effect, or is refused.

Options reach csdraft in two ways: as processors and criteria that `generate` has made from them, and in the generation
config. An option that is in none of the lists here comes from a newer transformers. If it is set, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, __version__
from transformers.generation.configuration_utils import GenerationMode

__all__ = ["CARRIED", "REFUSED", "WITHOUT_EFFECT", "check_early", "check_options", "effective"]


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


CARRIED = _names(
    # processors
    "bad_words_ids begin_suppress_tokens encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff "
    "eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id guidance_scale min_length "
    "min_new_tokens min_p no_repeat_ngram_size remove_invalid_values renormalize_logits repetition_penalty "
    "sequence_bias suppress_tokens temperature top_h top_k top_p typical_p watermarking_config "
    # criteria
    "eos_token_id max_length max_new_tokens max_time stop_strings "
    # the call
    "bos_token_id decoder_start_token_id do_sample num_return_sequences output_logits output_scores pad_token_id "
    "return_dict_in_generate"
)
"""Options that do the same as in plain `generate`."""

WITHOUT_EFFECT = _names(
    # options of transformers' own drafting, which has to be turned on by another option or an assistant_model
    "assistant_confidence_threshold assistant_ensemble_weight assistant_lookbehind is_assistant "
    "max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule speculation_type target_lookbehind "
    # options of beam search and contrastive search
    "diversity_penalty early_stopping length_penalty low_memory num_beam_groups "
    # options for how plain generate runs forwards, which csdraft does in its own way
    "compile_config continuous_batching_config disable_compile max_cache_len prefill_chunk_size "
    "_from_model_config transformers_version"
)
"""Options that do not change the text that csdraft writes."""


OTHER_DRAFTING = "asks transformers to draft, and assistant= is another way to draft"
OTHER_SEARCH = "asks for another search, and csdraft does greedy search and sampling only"
NOT_KEPT = "asks for tensors that drafted decoding does not keep"
HEALED = "needs the tokenizer, which transformers does not pass on: call model.heal_tokens(input_ids, tokenizer) first"
OWN_CACHE = "asks for a cache of another kind, and csdraft has its own preallocated one"
CACHES = ("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked")
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "use_mtp": (OTHER_DRAFTING, (None, False)),
    "prompt_lookup_num_tokens": (OTHER_DRAFTING, (None,)),
    "assistant_early_exit": (OTHER_DRAFTING, (None,)),
    "num_beams": (OTHER_SEARCH, (None, 1)),
    "penalty_alpha": (OTHER_SEARCH, (None, 0)),
    "dola_layers": (OTHER_SEARCH, (None,)),
    "constraints": (OTHER_SEARCH, (None,)),
    "force_words_ids": (OTHER_SEARCH, (None,)),
    "token_healing": (HEALED, (None, False)),
    "use_cache": ("leaves nothing to speed up: csdraft keeps its own KV cache", (None, True)),
    "output_attentions": (NOT_KEPT, (None, False)),
    "output_hidden_states": (NOT_KEPT, (None, False)),
    "cache_implementation": (OWN_CACHE, (None, *CACHES)),
    "cache_config": (OWN_CACHE, (None,)),
}
"""Options for what csdraft does not do -> why they are refused, and the values with which they are off."""

PLAIN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BEFORE_DECODING = ("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "token_healing",
                   "cache_implementation", "cache_config")  # fmt: skip
"""Refused options that `generate` acts on before csdraft is called."""


def check_early(keywords: Mapping[str, Any], config: GenerationConfig | None, own: GenerationConfig) -> None:
    """Raises ValueError for a refused option with which `generate` itself would fail with a misleading message."""
    for name in BEFORE_DECODING:
        _check(name, effective(name, keywords, config, own))


def check_options(config: GenerationConfig) -> None:
    """Raises a ValueError that names an option that csdraft does not support.

    Args:
        config: the options of a call, completed from the model's own generation config.
    """
    for name, (reason, _) in REFUSED.items():
        plain = reason == OTHER_SEARCH and config.get_generation_mode() in PLAIN
        unseen = reason == NOT_KEPT and not config.return_dict_in_generate
        if not (plain or unseen):  # penalty_alpha without a top_k does not change the search, for example
            _check(name, getattr(config, name, None))
    for name in vars(GenerationConfig()).keys() - (CARRIED | WITHOUT_EFFECT | REFUSED.keys()):
        if (value := getattr(config, name, None)) not in (None, False):
            raise ValueError(
                f"{name}={value!r} is an option of transformers {__version__} that this csdraft does not know, so the "
                f"text might differ from plain generate's; {_way_out(name)}"
            )


def effective(name: str, keywords: Mapping[str, Any], config: GenerationConfig | None, own: GenerationConfig) -> Any:
    """The value of a call's option: the keyword, else the given config's, else that of the model's own config."""
    values = keywords.get(name), getattr(config, name, None), getattr(own, name, None)
    return next((value for value in values if value is not None), None)


def _check(name: str, value: Any) -> None:
    reason, off = REFUSED[name]
    if not any(value is neutral or value == neutral for neutral in off):
        raise ValueError(f"{name}={value!r} {reason}; {_way_out(name)}")


def _way_out(name: str) -> str:
    return f"unset {name} (also in model.generation_config), or leave assistant= out"
