"""A tiny random model of any transformers class: its config made small, its weights made loud.

`small_config` takes a config class's defaults and replaces every size it knows by a small one (`SIZES`), layer by
layer lists by a sample that keeps every kind of layer, and nested configs likewise. What that does not get right for
a family is in `OVERRIDES`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from tests.families.overrides import DEFAULTS_NEED, OVERRIDES
from tests.tiny import PAD, VOCAB, WINDOW

__all__ = ["config_of", "loud_model"]

MOST_PARAMETERS = 60_000_000
"""A model of more has a size that nothing here has made small."""

_BY_SIZE = {
    VOCAB: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size unpadded_vocab_size "
    "vocab_size_per_layer_input t2u_vocab_size",
    32: "hidden_size d_model n_embd embed_dim dim embedding_size word_embed_proj_dim model_dim projection_dim "
    "out_hidden_size emb_dim encoder_hidden_size text_hidden_size output_dim hidden_size_global attention_hidden_size "
    "lru_width input_embedding_size output_embedding_size cross_attention_hidden_size projector_hidden_size "
    "embedding_dim vision_output_dim projector_output_dim projector_input_dim resampler_dim adapter_out_dim "
    "backbone_hidden_size audio_hidden_size decoder_hidden_size vision_hidden_size patch_embed_hidden_size "
    "moe_hidden_size kv_channels_total dim_model",
    48: "intermediate_size ffn_dim d_ff n_inner moe_intermediate_size shared_expert_intermediate_size encoder_ffn_dim "
    "decoder_ffn_dim ffn_hidden_size mlp_dim dim_ff dff d_inner intermediate_size_mlp expert_ffn_hidden_size "
    "shared_experts_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size share_expert_dim "
    "feed_forward_size shared_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim "
    "t2u_decoder_ffn_dim decoder_intermediate_size projection_hidden_dim projection_intermediate_size",
    4: "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads n_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts swa_num_attention_heads index_n_heads num_sliding_attention_heads linear_num_heads "
    "speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads conf_num_attention_heads "
    "linear_num_value_heads mamba_chunk_size chunk_size mamba_num_heads mamba_n_heads",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_top_k moe_k num_query_groups num_kv_shared_layers "
    "depth layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers resampler_depth "
    "conf_num_hidden_layers num_blocks n_mamba_heads",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group "
    "first_k_dense_replace mamba_n_groups mamba_ngroups n_groups num_dense_layers aligner_num_add_layers",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim d_kv swa_head_dim index_head_dim kv_channels dim_head "
    "d_head linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_size mamba_d_head mamba_head_dim "
    "mamba_headdim ssm_state_size state_size mamba_d_state rotary_dim adapter_rank o_lora_rank index_topk "
    "hidden_size_per_layer_input d_rel relative_attention_num_buckets num_buckets laurel_rank "
    "gated_norm_rank router_hidden_size floor_scale log_scaling_n_floor",
    16: "qk_head_dim kv_lora_rank q_lora_rank relative_attention_max_distance relative_max_distance image_size "
    "attention_head_dim",
    WINDOW: "sliding_window sliding_window_size window_size attention_chunk_size local_attention "
    "local_attention_window_len attention_window_size keep_window_size attention_window",
    256: "max_position_embeddings n_positions n_ctx max_seq_len seq_length context_length model_max_length "
    "max_target_positions max_source_positions max_encoder_position_embeddings max_decoder_position_embeddings "
    "t2u_max_position_embeddings num_position_embeddings",
}
SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
LAYERS = 4
ENCODER_LAYERS = ("encoder_layers", "num_encoder_layers")
OFF = {"tie_word_embeddings": False, "scale_embedding": False, "use_cache": True}
SCALES = {"initializer_range": 0.3, "init_std": 0.3, "init_method_std": 0.3, "initializer_std": 0.3}
IDS = ("_token_id", "_token_index")
TOKENS = {"pad_token_id": PAD, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2, "sep_token_id": 1}
WINDOWS_ON = {"use_sliding_window": True, "max_window_layers": 1}


class NotTiny(Exception):
    """A model that came out too large to be tried."""


def config_of(model_class: Any, config_class: type, **changes: Any) -> PretrainedConfig:
    """A small config for a model class: of a composite one the part that the class is made from.

    Args:
        changes: what a variant asks for, by name.
    """
    default = config_class(**DEFAULTS_NEED.get(config_class.model_type, {}))
    own = model_class.config_class
    for part in default.sub_configs:
        inner = getattr(default, part, None)
        if own is not None and not isinstance(default, own) and isinstance(inner, own):
            return small_config(type(inner), inner, **changes)
    return small_config(config_class, **changes)


def small_config(config_class: type, given: PretrainedConfig | None = None, **changes: Any) -> PretrainedConfig:
    """A config of this class with small sizes.

    Args:
        given: the value that a composite config has by default in this place, whose own choices are kept.
        changes: what is wanted beside, by name; a dot leads into a nested config.
    """
    name = config_class.model_type
    overrides = {**OVERRIDES.get(name, {}), **changes}
    default = config_class(**DEFAULTS_NEED.get(name, {}))
    wanted: dict[str, Any] = {}
    values = default.to_dict()
    if given is not None:
        own = {key: value for key, value in given.to_dict().items() if not isinstance(value, dict)}
        wanted = {key: value for key, value in own.items() if key in values and value != values[key]}
        values |= wanted
    if values.get("use_sliding_window") is False:
        wanted |= {key: value for key, value in WINDOWS_ON.items() if key in values}
        wanted["layer_types"] = None
    wanted |= _small_values(values)
    wanted |= _sampled_layers({**values, **wanted}, wanted)
    for part in default.sub_configs:
        inner = getattr(default, part, None)
        if isinstance(inner, PretrainedConfig):
            wanted[part] = small_config(type(inner), inner, **_nested(overrides, part))
    wanted |= {key: value for key, value in overrides.items() if "." not in key}
    return config_class(**wanted)


def _nested(changes: dict[str, Any], part: str) -> dict[str, Any]:
    """Of changes such as {"text_config.layers": 2}, those of one part."""
    return {key[len(part) + 1 :]: value for key, value in changes.items() if key.startswith(part + ".")}


def _small_values(values: dict[str, Any]) -> dict[str, Any]:
    """What a config's own numbers become."""
    small = {key: new for key, value in values.items() if (new := _small_value(key, value)) is not None}
    others = [key for key, value in values.items() if key.endswith(IDS) and isinstance(value, int)]
    small |= {key: VOCAB + 100 + i for i, key in enumerate(others) if key not in TOKENS}  # of pictures and sounds
    small |= {key: TOKENS[key] for key in values if key in TOKENS}
    if values.get("is_decoder") is False and not values.get("is_encoder_decoder"):
        small["is_decoder"] = True
    if "kv_lora_rank" in values:  # latent attention has one key a head
        small["num_key_value_heads"] = SIZES["num_attention_heads"]
    return small


def _small_value(key: str, value: Any) -> Any:
    """What one of a config's values becomes; None: it stays."""
    if key in SIZES and _larger(value, SIZES[key], key in ("sliding_window", "head_dim")):
        return SIZES[key]
    if key in LAYER_COUNTS + ENCODER_LAYERS and isinstance(value, int):
        return LAYERS  # alike, since caches of decoders alone are sized by the encoder's count
    if (key in OFF or "dropout" in key) and isinstance(value, bool | int | float):
        return OFF.get(key, type(value)(0))
    if key in SCALES and isinstance(value, float):
        return SCALES[key]
    if key == "rope_parameters" and isinstance(value, dict):
        return _short_rope(value)
    return None


def _larger(value: object, size: int, default: bool) -> bool:
    """Whether a number of a config is larger than `size`; `default` for None."""
    return default if value is None else isinstance(value, int) and not isinstance(value, bool) and value > size


def _short_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of 8, whose sections by axis fill the half, and that change within the texts."""
    short = {key: _short_rope(value) if isinstance(value, dict) else value for key, value in rope.items()}
    small = {"mrope_section": [2, 1, 1], "original_max_position_embeddings": 32}
    return short | {key: value for key, value in small.items() if key in short}


def _sampled_layers(values: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Lists of one entry a layer, shortened so that every kind of layer stays."""
    counts = [values[key] for key in LAYER_COUNTS if isinstance(values.get(key), int)]
    lists = {key: value for key, value in values.items() if isinstance(value, list) and key not in wanted}
    lengths = {len(value) for value in lists.values() if key_is_per_layer(value)}
    if not counts or not lengths:
        return {}
    depth = max(lengths)
    lists = {key: value for key, value in lists.items() if len(value) == depth and key_is_per_layer(value)}
    kinds: dict[tuple, int] = {}
    for layer in range(depth):
        kinds.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    picked = sorted(kinds.values())[: LAYERS + 2]
    for extra in (depth - 1, depth // 2, depth // 4, 1):
        if len(picked) < LAYERS and extra not in picked:
            picked.append(extra)
    picked.sort()
    small = {key: [value[layer] for layer in picked] for key, value in lists.items()}
    return small | {key: len(picked) for key in LAYER_COUNTS if isinstance(values.get(key), int)}


def key_is_per_layer(value: list) -> bool:
    """Whether a config's list looks like one entry a layer."""
    return len(value) >= 6 and all(isinstance(entry, str | int | float) for entry in value)


def loud_model(model_class: Any, config: PretrainedConfig, attention: str, seed: int, sharp: float) -> nn.Module:
    """A random model whose every parameter matters: no norm is 1, no bias is 0, attention is far from uniform.

    Args:
        sharp: factor on the output layer, so that greedy texts are neither one token nor full of near ties.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise NotTiny(f"{size / 1e6:.0f} million parameters")
    model = model_class._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            if not bool(torch.isfinite(parameter).all()) or (parameter.dim() > 1 and spread < 0.15):
                parameter.normal_(std=1.0 if "relative" in name else 0.3)  # quiet, or memory as it was found
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
        head = model.get_output_embeddings()
        if head is not None and isinstance(getattr(head, "weight", None), torch.Tensor):
            head.weight.mul_(sharp)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=2, decoder_start_token_id=2)
    return model
