"""A tiny random model of every family in transformers' mappings of causal LMs, and of models of images and
text.

    model = make_tiny("qwen3_next")

The config is the family's default one with small numbers: windows, chunks and top-k are smaller than the
rows, and there are as many layers as it takes to have each kind once. `OTHER` holds the values of families
whose fields mean something else.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from dpo_cache.lm.model.towers import as_whole, loading_class

VOCAB = 264
SPREAD = 0.3  # of random weights: log-probs are far from uniform, so a wrong mask shows
FAMILIES: tuple[str, ...] = tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# families with towers for images or sounds; older versions of transformers have another mapping
IMAGES_AND_TEXT: dict[str, str] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
MULTIMODAL: dict[str, str] = {
    **getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
    **IMAGES_AND_TEXT,
}
# those that `AutoModelForCausalLM` does not know
WITH_TOWERS: tuple[str, ...] = tuple(family for family in IMAGES_AND_TEXT if family not in FAMILIES)

# fields that list the kind of each layer
LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "block_types",
    "attn_layers",
    "activation_sparsity_pattern",
)
COUNTS_OF_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
)

SMALL: dict[str, Any] = {
    # size
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "decoder_vocab_size": VOCAB, "audio_vocab_size": VOCAB,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "attention_hidden_size": 32, "embedding_size": 32,
    "input_embedding_size": 32, "output_embedding_size": 32, "word_embed_proj_dim": 32, "lru_width": 32, "backbone_hidden_size": 32,
    "hidden_size_per_layer_input": 8, "ple_embed_dim": 8, "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "dff": 48, "dim_ff": 48, "d_inner": 48, "ffn_hidden_size": 48, "feed_forward_size": 48, "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48, "prefix_dense_intermediate_size": 48, "pronunciation_embed_dim": 16, "shape_embed_dim": 16,
    "pronunciation_vocab_size": 40, "shape_vocab_size": 40,
    # layers: as many as there are kinds
    "encoder_layers": 1, "num_encoder_layers": 1,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2, "attention_head_size": 8, "dim_head": 8, "kv_channels": 8, "d_head": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "swa_v_head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "query_pre_attn_scalar": 8, "rotary_dim": 4,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2,
    "top_k_experts": 2, "moe_intermediate_size": 24, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "shared_intermediate_size": 24, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "router_hidden_size": 16, "num_expert_groups": 2,
    # reach of attention, shorter than the rows
    "sliding_window": 8, "sliding_window_size": 8, "attention_window_size": 8, "window_size": 8, "local_attention": 8, "keep_window_size": 8,
    "attention_chunk_size": 12, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2,
    "indexer_n_heads": 2, "indexer_head_dim": 16, "floor_scale": 16, "log_scaling_n_floor": 16,
    "local_attention_window_len": 16, "rel_extent": 16, "relative_max_distance": 16, "mem_len": 0, "context_length": 256,
    # positions
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "max_target_positions": 256, "original_max_position_embeddings": 256,
    # states
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_head_dim": 8,
    "linear_num_heads": 4, "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_d_ssm": 64,
    "state_size": 16, "ssm_state_size": 16, "time_step_rank": 4, "mamba_dt_rank": 4, "chunk_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "n_groups": 1, "mamba_headdim": 8, "n_mamba_heads": 2, "block_size": 16,
    # width of small projections
    "altup_num_inputs": 2, "laurel_rank": 8, "adapter_rank": 8, "loop_gate_rank": 8, "d_rel": 8, "gated_norm_rank": 8, "hc_lowrank": 8,
    # spread of random weights
    "initializer_range": SPREAD, "init_std": SPREAD, "embed_init_std": SPREAD,
    # no dropout: the model is in eval mode in any case
    "is_decoder": True, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

MIXED = ["sliding_attention", "full_attention"]
KINDS_OF_LAYERS = {"layer_types": MIXED, "num_hidden_layers": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TIMM = {"vision_config": None, "audio_config": None}
SHARED_KEYS = {  # the last two layers take keys and values from the first two
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED * 2,
}  # fmt: skip

ASSISTED = {  # without layers that an assistant does not have
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2, "num_hidden_layers": 2,
    "layer_types": MIXED, "hidden_size": 32, "head_dim": 8, "global_head_dim": 16,
}  # fmt: skip
# Without these, a family has no default config.
REQUIRED = {"gemma4_assistant": {"text_config": {**ASSISTED, "model_type": "gemma4_text"}}}

# Values that differ: fields that mean something else in a family, and kinds of layers that are not default.
OTHER: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        **{name: {"hidden_size_global": 32, "num_key_value_heads": None} for name in ("encoder_config", "decoder_config")},
        "encoder_hash_byte_group_size": [2, 3], "encoder_hash_byte_group_vocab": 100, "vocab_size": 260,
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {**KINDS_OF_LAYERS, "rope_parameters": {
        name: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]} for name in MIXED}},
    "dbrx": {"attn_config": {"clip_qkv": 4.0, "kv_n_heads": 2, "rope_theta": 10000.0}, "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2}},
    "dots1": {**KINDS_OF_LAYERS, "use_sliding_window": True},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_local_experts": 4, "per_layer_config": None},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"], "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"],
        "use_dsa": True, **{f"swa_{name}": value for name, value in {
            "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8}.items()}, "head_dim": 16,
    },
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "falcon_h1": {"lm_head_multiplier": 0.7, "key_multiplier": 0.9, "attention_out_multiplier": 1.2},
    "gemma3n_text": {**SHARED_KEYS, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma4_text": {**SHARED_KEYS, "global_head_dim": 16, "num_global_key_value_heads": 1, "head_dim": 8},
    "gemma4_unified_text": {**SHARED_KEYS, "global_head_dim": 16, "num_global_key_value_heads": 1, "head_dim": 8},
    "gemma4_assistant": {"text_config": {**ASSISTED, "model_type": "gemma4_text"}},
    "got_ocr2_vision": {"image_size": 64, "mlp_dim": 48, "output_channels": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1,
                           "loop_layer_index_end": 2, "num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": KINDS_OF_LAYERS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0], "floor_scale": 128},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": KINDS_OF_LAYERS,
    "minicpm3": {"dim_model_base": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]},
    "phi4_multimodal_audio": {"nemo_conv_channels": 8, "ext_pw_out_channel": 16},
    "prophetnet": {"relative_max_distance": 32},
    "qwen2": {**KINDS_OF_LAYERS, "use_sliding_window": True},
    "qwen2_moe": {**KINDS_OF_LAYERS, "use_sliding_window": True},
    "qwen3": {**KINDS_OF_LAYERS, "use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen4_exp_text": {
        "indexer_kv_heads": 1, "indexer_budget": 8, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8, "ple_embed_dim": 32,
    },
    "reformer": {
        "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [8, 24], "attn_layers": ["local", "lsh"], "num_buckets": 8,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "hash_seed": 0,
    },
    "smollm3": {**KINDS_OF_LAYERS, "use_sliding_window": True},
    "starcoder2": {},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}  # fmt: skip


def _each(names: tuple[str, ...], fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names, fields)


# The same for configs of towers, and of language models that are only in models with towers.
OTHER |= {
    **_each(
        ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text",
         "cosmos3_edge_text", "hy_v4_vl_text"),
        {"rope_parameters": MROPE},
    ),
    "glm4v_moe_text": {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "qwen2_vl_vision": {"depth": 1, "embed_dim": 32},
    **_each(
        ("qwen2_5_vl_vision", "glm4v_vision", "glm4v_moe_vision", "glm_ocr_vision", "qwen2_5_omni_vision_encoder",
         "granite_docling_vision", "exaone4_5_vision", "glm5_next_vision"),
        {"depth": 1, "out_hidden_size": 32},
    ),
    "inkling2_vision": {"text_hidden_size": 32},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}, "moe_intermediate_size": [24, 24]},
    "exaone4_5": {"text_config": {"model_type": "exaone4"}, "vision_config": {"model_type": "exaone4_5_vision"}},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]]},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0,
                                            "mrope_section": [1, 1, 1, 1]}},
    "janus_vision_model": {"projection_dim": 32},
    "janus_vqgan": {"num_embeddings": 64, "projection_dim": 32, "base_channels": 32, "channel_multiplier": [1, 1]},
    **_each(("kosmos_2_text_model", "kosmos_2_5_text_model"), {"embed_dim": 32, "layers": 2}),
    "kosmos-2.5": {"latent_query_num": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_glimmer": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "muse_spark_audio": {"patch_sizes": [16, 6], "hidden_sizes": [32, 32], "depths": [1, 1]},
    **_each(("emu3_vqgan", "chameleon_vqgan"), {"base_channels": 32, "channel_multiplier": [1] * 5}),
    "nemotron_h_omni": {"projector_hidden_size": 32},
    "radio": {"video_temporal_patch_size": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "wavtokenizer_encoder": {"codebook_dim": 32},
}  # fmt: skip


# Other settings of families, which may be run in another way.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, not a decoder": ("bert", {"is_decoder": False}),
    "bloom, residual after norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "cohere, normed queries": ("cohere", {"use_qk_norm": True}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3_text, both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24, "attention_k_eq_v": True},
    ),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False}),
    "llama4_text, rows past the floor of its tuning": ("llama4_text", {"floor_scale": 16}),
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "opt, narrow embeddings": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi3, rows past its long rope": ("phi3", {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
        },
    }),
    "phimoe, no window": ("phimoe", {"sliding_window": None}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "xlm, causal": ("xlm", {"causal": True}),
    "xlnet, one direction": ("xlnet", {"attn_type": "uni"}),
}  # fmt: skip
CASES: tuple[str, ...] = (*sorted(FAMILIES), *sorted(VARIANTS), *sorted(WITH_TOWERS))


def make_config(family: str, **changes: Any) -> hf.PreTrainedConfig:
    """The family's tiny config, or a variant's."""
    family, more = VARIANTS.get(family, (family, {}))
    changes = {**more, **changes}
    kind = getattr(hf, CONFIG_MAPPING_NAMES[family])
    return kind(**_merged(_small_fields(kind), {**OTHER.get(family, {}), **changes}))


def make_tiny(family: str, **changes: Any) -> hf.PreTrainedModel:
    """The family's tiny model in eval mode, its weights random but the same each time; biases and norms, too,
    which start as zeros and ones.
    """
    config, family = make_config(family, **changes), VARIANTS.get(family, (family,))[0]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _build(family, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def _build(family: str, config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    """The model that is in checkpoints of the family: with its towers for images and sounds, if it has them."""
    whole = MULTIMODAL.get(family)
    if family in WITH_TOWERS or (whole is not None and "text_config" in config.sub_configs):
        try:
            return getattr(hf, str(whole))(config)
        except ImportError:  # a tower that needs timm
            return make_without_towers(str(whole), config)
    return hf.AutoModelForCausalLM.from_config(config)


def make_without_towers(whole: str, config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    config.architectures = [whole]
    kind = loading_class(config)
    assert kind is not None
    return as_whole(kind(config))


def _small_fields(kind: type[hf.PreTrainedConfig]) -> dict[str, Any]:
    """Small values for the fields that configs of this kind have, and for those of the configs inside."""
    names = _names(kind)
    default = kind(**REQUIRED.get(kind.model_type, {}))
    small = {name: value for name, value in SMALL.items() if name in names}
    if "kv_lora_rank" in names:
        small["num_key_value_heads"] = small["num_attention_heads"]  # one latent key for all heads
    for name in names:
        if isinstance(value := _value(default, name), hf.PreTrainedConfig):
            small[name] = _merged(_small_fields(type(value)), OTHER.get(value.model_type, {}))
    return {**small, **_layers(default, names)}


def _names(kind: type[hf.PreTrainedConfig]) -> set[str]:
    """The fields that the family's classes declare, without those of all configs."""
    if not dataclasses.is_dataclass(kind):  # older versions of transformers
        return {*inspect.signature(kind.__init__).parameters} - {"self", "kwargs"}
    classes = kind.__mro__[: kind.__mro__.index(hf.PreTrainedConfig)]
    declared = {name for one in classes for name in inspect.get_annotations(one)}
    return declared & {field.name for field in dataclasses.fields(kind)}


def _value(config: hf.PreTrainedConfig, name: str) -> Any:
    """The field's value, None where it differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _layers(default: hf.PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """Each combination of kinds of layers once, in their order; two layers where all are alike."""
    lists = {
        name: value
        for name in LAYER_LISTS
        if name in names and isinstance(value := _value(default, name), list)
    }
    longest = max(map(len, lists.values()), default=0)
    lists = {name: value for name, value in lists.items() if len(value) == longest}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True))) if lists else []
    num_layers = max(2, len(kinds))
    kinds = (kinds * 2)[:num_layers]
    chosen = {name: [kind[place] for kind in kinds] for place, name in enumerate(lists)}
    return {**chosen, **{name: num_layers for name in COUNTS_OF_LAYERS if name in names}}


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The fields with the changes, also to configs inside."""
    changed = {
        name: _merged(fields[name], value)
        if isinstance(value, dict) and isinstance(fields.get(name), dict)
        else value
        for name, value in changes.items()
    }
    return {**fields, **changed}
