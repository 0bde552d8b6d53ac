"""What making a config small needs to be told about single families; keys of nested configs have a dot."""

from __future__ import annotations

from typing import Any

__all__ = ["DEFAULTS_NEED", "OVERRIDES", "VARIANTS"]

SLIDING = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
SPEECH = {"hidden_dim": 32, "num_heads": 4, "dim_head": 8, "output_dim": 32, "context_size": 16}
SPEECH |= {"max_pos_emb": 64, "input_dim": 16}
TOKENS = {"image_token_id": 201, "video_token_id": 202, "audio_token_id": 203, "vision_start_token_id": 204}

DEFAULTS_NEED: dict[str, dict[str, Any]] = {}
"""model_type -> what the config class cannot be made without."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]} for kind in set(SLIDING)
        },
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2, "num_hidden_layers": 4}
    | {"layer_types": SLIDING},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": SLIDING},
    "gemma4_unified_text": {"num_kv_shared_layers": 2, "layer_types": SLIDING},
    "diffusion_gemma_text": EXPERTS,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [48, 48]}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    | {"indexer_compress_ratio": 2, "ngram_vocab_size_base": 100, "hc_lowrank": 16},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"] * 2}
    | {"local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
    "xlm": {"n_langs": 2, "causal": True, "mask_token_id": 3},
    "xmod": {"default_language": "en_XX"},
    "glm4v_text": SECTIONS,
    "glm4v_moe_text": {"head_dim": 16} | SECTIONS,
    "glm_ocr_text": {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}},
    "qwen2_vl_text": SECTIONS,
    "qwen2_5_vl_text": SECTIONS,
    "paddleocr_vl_text": SECTIONS,
    "hunyuan_vl_text": SECTIONS,
    "qwen2_5_omni_text": SECTIONS,
    "qwen2_5_omni_thinker": TOKENS,
    "qwen3_omni_moe_thinker": TOKENS,
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "granite_speech_encoder": SPEECH,
    "granite_speech_plus_encoder": SPEECH,
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64}
    | {"num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "mamba_ngroups": 1}
    | {"mamba_headdim": 32, "attention_hidden_size": 64},
    "glm5_next_text": {"index_topk": 8, "index_kpool": 2, "qk_rope_head_dim": 0},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,
        "deepstack_layer_map": [[1, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
    },
    "xlstm": {"hidden_size": 64, "num_blocks": 4, "chunk_size": 16, "qk_dim_factor": 1.0},
    "dots3_note_text": {f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")}
    | {f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")}
    | {"swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "dots3_note": {"vision_config.adapter_in_dim": 32, "vision_config.mlp_layer_types": ["dense"] * 4}
    | {"audio_config.adapter_input_size": 32},
    "janus": {"vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1]},
    "florence2": {"vision_config.embed_dim": [32] * 4, "vision_config.num_heads": [4] * 4}
    | {"vision_config.num_groups": [4] * 4, "vision_config.depths": [1] * 4},
    "muse_spark": {"audio_config.hidden_sizes": [32] * 4},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config.num_filters": 2}
    | {"semantic_tokenizer_encoder_config.num_filters": 2},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 1]},
    "apertus1p5": {"audio_config.codebook_dim": 32, "audio_config.codebook_size": 8, "audio_token_offset": 88}
    | {"vision_config.codebook_size": 8, "image_token_offset": 80, "vision_config.base_channels": 32}
    | {"vision_config.channel_multiplier": [1, 1], "vision_config.num_res_blocks": 1},
    "nemo_speechlm": {
        "text_config.n_group": 1,
        "text_config.topk_group": 1,
        "word_timestamp_config.blank_token_id": 96,
    },
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0}
    | {"text_config.num_kv_shared_layers": 4},
    "emu3": {
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token 000000|>": 92},
    },
    "chameleon": {"vocabulary_map": {"<image>": 90}},
}

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
MSCALES = {"short_mscale": 1.0, "long_mscale": 1.2}
FULL = {"layer_types": ["full_attention"] * 4, "num_hidden_layers": 4}
LONGROPE |= {"original_max_position_embeddings": 32, "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dynamic rotary": ("LlamaForCausalLM", "llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    "longrope": ("LlamaForCausalLM", "llama", {"rope_parameters": LONGROPE}),
    "yarn": ("LlamaForCausalLM", "llama", {"rope_parameters": YARN}),
    "longrope, rereads": ("Phi3ForCausalLM", "phi3", {"rope_parameters": LONGROPE}),
    "longrope, MoE": ("PhimoeForCausalLM", "phimoe", {"rope_parameters": LONGROPE | MSCALES}),
    "no window": ("MistralForCausalLM", "mistral", {"sliding_window": None}),
    "windows off": ("Qwen2ForCausalLM", "qwen2", {"use_sliding_window": False, "layer_types": None}),
    "window of 3": ("MistralForCausalLM", "mistral", {"sliding_window": 3}),
    "windows in some layers": ("Qwen3ForCausalLM", "qwen3", {"layer_types": SLIDING}),
    "window in a config without": ("LlamaForCausalLM", "llama", {"sliding_window": 8}),
    "ALiBi": ("FalconForCausalLM", "falcon", {"alibi": True}),
    "one key head": ("FalconForCausalLM", "falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "new architecture": ("FalconForCausalLM", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "a key head each": ("GPTBigCodeForCausalLM", "gpt_bigcode", {"multi_query": False}),
    "reordered": (
        "GPT2LMHeadModel",
        "gpt2",
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "both ways": ("BertLMHeadModel", "bert", {"is_decoder": False}),
    "both ways, text": ("Gemma3ForCausalLM", "gemma3_text", {"use_bidirectional_attention": True}),
    "both ways, all": ("Gemma4ForCausalLM", "gemma4_text", {"use_bidirectional_attention": "all"}),
    "global layers": ("GPTNeoForCausalLM", "gpt_neo", {"attention_layers": ["global"] * 4}),
    "window as published": ("GPTNeoForCausalLM", "gpt_neo", {"window_size": 256, "max_position_embeddings": 512}),
    "full attention": ("BigBirdForCausalLM", "big_bird", {"attention_type": "original_full"}),
    "one cache a loop": ("DoryForCausalLM", "dory", {"recurrent_kv_cache_mode": "last_loop"}),
    "no chunks": ("Llama4ForCausalLM", "llama4_text", FULL),
    "without convolutions": ("Lfm2ForCausalLM", "lfm2", FULL),
}
"""Name of a variant -> model class, model type, changes: other paths through a class's code than its defaults take."""
