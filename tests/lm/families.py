"""Tiny random models of the families that people fine-tune, also for the oldest transformers.

`tests/families/tiny.py` has all families of today's. Windows and chunks are shorter than the sequences, so that a wrong mask shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf

VOCAB = 264
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY = {**BASE, "num_key_value_heads": 2}
WITH_HEADS = {**TINY, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXED = ["sliding_attention", "full_attention"]
GPT2_LIKE = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
}

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**TINY, sliding_window=9)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_local_experts=4, sliding_window=9)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"])
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WITH_HEADS)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**WITH_HEADS, **EXPERTS)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**WITH_HEADS)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**WITH_HEADS, sliding_window=10, attn_logit_softcapping=5.0, final_logit_softcapping=4.0, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WITH_HEADS, sliding_window=10, layer_types=MIXED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**TINY)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TINY, sliding_window=9)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**TINY)),
    "olmo3": lambda: hf.Olmo3ForCausalLM(hf.Olmo3Config(**TINY, sliding_window=9, layer_types=MIXED)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**BASE)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2_LIKE)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
            word_embed_proj_dim=32, init_std=0.3,
        )
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**WITH_HEADS, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, layer_types=MIXED)
    ),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**TINY, use_sliding_window=True, sliding_window=8, layer_types=MIXED)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**TINY, logit_scale=0.3)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**TINY, sliding_window=8, logit_scale=0.3, layer_types=MIXED)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(**TINY, logits_scaling=3.0, attention_multiplier=0.5, embedding_multiplier=2.0, residual_multiplier=0.7)
    ),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**TINY, sliding_window=9)),
    "exaone4": lambda: hf.Exaone4ForCausalLM(hf.Exaone4Config(**TINY, sliding_window=9, layer_types=MIXED)),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**WITH_HEADS)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **BASE, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=24, n_shared_experts=1,
            first_k_dense_replace=1,
        )
    ),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **WITH_HEADS, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=12, layer_types=["chunked_attention", "full_attention"]
        )
    ),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT2_LIKE, rotary_dim=4)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(vocab_size=VOCAB, hidden_size=32, state_size=16, num_hidden_layers=2, head_dim=16, num_heads=4, expand=2, n_groups=1,
                        chunk_size=16, initializer_range=0.3)
    ),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **WITH_HEADS, **EXPERTS, shared_expert_intermediate_size=24, linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        )
    ),
}  # fmt: skip


def make_model(family: str) -> hf.PreTrainedModel:
    """The family's tiny model, its weights random but the same each time; biases and norms, too, which start
    as zeros and ones.
    """
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model
