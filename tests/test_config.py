"""config.json and GGUF metadata -> ModelConfig: every family, both spellings, files that lie."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxinfer import rotary
from jaxinfer.checkpoint.gguf_config import config_from_gguf
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.config import ModelConfig, Rope
from jaxinfer.errors import CorruptFile, InvalidArgument, JaxinferError, UnsupportedModel

# Published config.json files, in the spelling of transformers 4.
LLAMA_2_7B = json.loads("""{
  "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
  "use_cache": true, "vocab_size": 32000}""")
LLAMA_31_8B = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0,
  "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
  "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
  "vocab_size": 128256}""")
SMOLLM2 = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
  "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
  "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
  "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
  "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}""")
MISTRAL_V01 = json.loads("""{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
  "use_cache": true, "vocab_size": 32000}""")
MISTRAL_V03 = MISTRAL_V01 | {
    "attention_dropout": 0.0,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN25_7B = json.loads("""{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
  "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
  "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
  "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 152064}""")
QWEN3_8B = json.loads("""{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
  "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
  "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
  "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""")
GEMMA2_9B = json.loads("""{
  "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
  "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
  "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
  "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
  "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
  "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
  "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 256000}""")
GEMMA3_270M = json.loads("""{
  "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
  "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2, "eos_token_id": 1,
  "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
  "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
  "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
  "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
  "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
  "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": false, "use_cache": true,
  "vocab_size": 262144}""")
GEMMA3_270M["layer_types"] = (["sliding_attention"] * 5 + ["full_attention"]) * 3
GEMMA3_1B = json.loads("""{
  "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
  "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
  "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
  "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
  "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
  "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": true,
  "vocab_size": 262144}""")
GEMMA3_4B = json.loads("""{
  "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
  "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
  "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
  "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
  "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
  "sliding_window": 1024}, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
  "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"}
  }""")
PHI3_MINI_4K = json.loads("""{
  "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"],
  "attention_bias": false, "attention_dropout": 0.0, "auto_map": {"AutoConfig":
  "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
  "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu",
  "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
  "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
  "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": true,
  "vocab_size": 32064}""")
OLMO2_7B = json.loads("""{
  "architectures": ["Olmo2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
  "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 500000,
  "tie_word_embeddings": false, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0",
  "use_cache": false, "vocab_size": 100352}""")
SMOLLM3_3B = json.loads("""{
  "architectures": ["SmolLM3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": null, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 65536,
  "max_window_layers": 28, "mlp_bias": false, "model_type": "smollm3",
  "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36,
  "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 5000000.0, "sliding_window": null, "torch_dtype": "bfloat16",
  "transformers_version": "4.54.0.dev0", "use_cache": false, "use_sliding_window": false,
  "vocab_size": 128256}""")
SMOLLM3_3B["layer_types"] = ["full_attention"] * 36
SMOLLM3_3B["no_rope_layers"] = [1, 1, 1, 0] * 9


def load(config: dict[str, Any], **changes: Any) -> ModelConfig:
    """config.json with changes; a value of `...` takes the field away."""
    config = {k: v for k, v in (config | changes).items() if v is not ...}
    return config_from_hf(json.loads(json.dumps(config)), where="x/config.json")


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def ropes(config: ModelConfig) -> set[Rope | None]:
    return {layer.rope for layer in config.layers}


def dims(c: ModelConfig) -> tuple[int, ...]:
    """V, D, F, L, N, K, H, context."""
    return (
        *(c.vocab_size, c.width, c.hidden, c.num_layers, c.num_heads, c.num_kv_heads),
        *(c.head_dim, c.max_len),
    )


# --- Published models ----------------------------------------------------------------------------


def test_llama_2() -> None:
    c = load(LLAMA_2_7B)
    assert dims(c) == (32000, 4096, 11008, 32, 32, 32, 128, 4096)
    assert ropes(c) == {Rope(theta=10000.0, dim=128)}
    assert not c.tied


def test_llama_31() -> None:
    c = load(LLAMA_31_8B)
    assert dims(c) == (128256, 4096, 14336, 32, 32, 8, 128, 131072)
    rope = Rope(500000.0, 128, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert ropes(c) == {rope}
    assert windows(c) == [None] * 32
    assert c.norm_eps == 1e-5
    assert c.attention_scale == 128**-0.5
    assert (c.family, c.activation, c.embed_scale) == ("llama", "silu", 1.0)
    assert (c.tied, c.qkv_bias, c.out_bias, c.mlp_bias, c.post_norm) == (False,) * 5
    assert c.pre_norm
    assert c.qk_norm == "none"


def test_smollm2() -> None:
    c = load(SMOLLM2)
    assert dims(c) == (49152, 576, 1536, 30, 9, 3, 64, 8192)
    assert ropes(c) == {Rope(100000.0, 64)}
    assert c.tied


def test_mistral() -> None:
    old, new = load(MISTRAL_V01), load(MISTRAL_V03)
    assert dims(old) == (32000, 4096, 14336, 32, 32, 8, 128, 32768)
    assert windows(old) == [4096] * 32
    assert windows(new) == [None] * 32
    assert windows(load(MISTRAL_V01, sliding_window=...)) == [4096] * 32  # the class's default
    assert ropes(new) == {Rope(1e6, 128)}


def test_qwen25() -> None:
    c = load(QWEN25_7B)
    assert dims(c) == (152064, 3584, 18944, 28, 28, 4, 128, 32768)
    assert (c.qkv_bias, c.out_bias, c.mlp_bias) == (True, False, False)
    assert windows(c) == [None] * 28  # use_sliding_window is false
    on = load(QWEN25_7B, use_sliding_window=True, sliding_window=99, max_window_layers=20)
    assert windows(on) == [None] * 20 + [99] * 8


def test_qwen25_with_yarn_reads_as_far_as_yarn_stretches() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    c = load(QWEN25_7B, rope_scaling=yarn)
    gain = 0.1 * math.log(4.0) + 1.0
    assert ropes(c) == {Rope(1e6, 128, "yarn", 4.0, 32768, attention_factor=gain)}
    assert c.max_len == 131072


def test_qwen3() -> None:
    c = load(QWEN3_8B)
    assert dims(c) == (151936, 4096, 12288, 36, 32, 8, 128, 40960)
    assert c.qk_norm == "head"
    assert not c.qkv_bias
    assert load(QWEN3_8B, head_dim=...).head_dim == 128
    assert load(QWEN3_8B, attention_bias=True).out_bias


def test_gemma2() -> None:
    c = load(GEMMA2_9B)
    assert dims(c) == (256000, 3584, 14336, 42, 16, 8, 256, 8192)
    assert windows(c) == [4096, None] * 21
    assert (c.attention_softcap, c.logit_softcap) == (50.0, 30.0)
    assert c.attention_scale == 256**-0.5
    assert c.embed_scale == math.sqrt(3584)
    assert c.activation == "gelu_tanh"
    assert c.pre_norm
    assert c.post_norm
    assert c.tied
    assert c.qk_norm == "none"
    big = load(GEMMA2_9B, query_pre_attn_scalar=144, final_logit_softcapping=None)
    assert big.attention_scale == 144**-0.5
    assert big.logit_softcap is None


@pytest.mark.parametrize(("sample", "layers"), [(GEMMA3_270M, 18), (GEMMA3_1B, 26)])
def test_gemma3(sample: dict[str, Any], layers: int) -> None:
    c = load(sample)
    assert c.num_layers == layers
    assert windows(c) == ([512] * 5 + [None]) * (layers // 6) + [512] * (layers % 6)
    for layer in c.layers:
        assert layer.rope == Rope(1e6 if layer.window is None else 1e4, 256)
    assert (c.family, c.qk_norm, c.attention_softcap) == ("gemma3", "head", None)
    assert c.attention_scale == 1 / 16
    assert c.tied
    assert c.post_norm
    assert windows(load(GEMMA3_1B, sliding_window_pattern=2)) == [512, None] * 13


def test_gemma3_with_vision_is_its_text_part() -> None:
    c = load(GEMMA3_4B)
    assert dims(c) == (262208, 2560, 10240, 34, 8, 4, 256, 131072)
    # Linear scaling is for global layers only.
    assert c.layers[0].rope == Rope(1e4, 256)
    assert c.layers[0].window == 1024
    assert c.layers[5].rope == Rope(1e6, 256, "linear", 8.0)
    assert c.layers[5].window is None
    assert c.tied
    assert not load(GEMMA3_4B, tie_word_embeddings=False).tied


def test_phi3() -> None:
    c = load(PHI3_MINI_4K)
    assert dims(c) == (32064, 3072, 8192, 32, 32, 32, 96, 4096)
    assert windows(c) == [2047] * 32
    assert ropes(c) == {Rope(1e4, 96)}
    assert ropes(load(PHI3_MINI_4K, partial_rotary_factor=0.75)) == {Rope(1e4, 72)}


def test_olmo2() -> None:
    c = load(OLMO2_7B)
    assert dims(c) == (100352, 4096, 11008, 32, 32, 32, 128, 4096)
    assert c.qk_norm == "full"
    assert c.post_norm
    assert not c.pre_norm


def test_smollm3() -> None:
    c = load(SMOLLM3_3B)
    assert dims(c) == (128256, 2048, 11008, 36, 16, 4, 128, 65536)
    assert [layer.rope is not None for layer in c.layers] == [True, True, True, False] * 9
    assert ropes(c) == {Rope(5e6, 128), None}
    assert c.tied
    assert load(SMOLLM3_3B, no_rope_layers=...).layers == c.layers
    third = load(SMOLLM3_3B, no_rope_layers=None, no_rope_layer_interval=3, layer_types=None)
    assert [layer.rope is not None for layer in third.layers] == [True, True, False] * 12
    sliding = load(SMOLLM3_3B, layer_types=..., use_sliding_window=True, sliding_window=7)
    assert windows(sliding) == [None, None, None, 7] * 9


def test_model_type_may_come_from_the_class() -> None:
    assert load(SMOLLM2, model_type=...) == load(SMOLLM2)


def test_old_yarn_of_mistral_and_explicit_fields_of_yarn() -> None:
    old = {"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 8192}
    assert load(MISTRAL_V03, rope_scaling=old | {"type": "yarn"}).max_len == 131072
    scaling = {"rope_type": "yarn", "factor": 4, "beta_fast": 16, "beta_slow": 2}
    scaling |= {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
    (rope,) = ropes(load(LLAMA_2_7B, rope_scaling=scaling))
    assert rope is not None
    gain = (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)
    assert rope.attention_factor == pytest.approx(gain, rel=1e-12)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (16.0, 2.0, False)
    assert rope.original_max_len == 4096  # max_position_embeddings, where nothing else says it
    scaling["attention_factor"] = 1.5
    (rope,) = ropes(load(LLAMA_2_7B, rope_scaling=scaling))
    assert rope is not None
    assert rope.attention_factor == 1.5


def test_outer_original_context_counts_over_the_inner_one() -> None:
    changed = load(LLAMA_31_8B, original_max_position_embeddings=4096)
    assert {r.original_max_len for r in ropes(changed) if r} == {4096}


# --- Refused by name -----------------------------------------------------------------------------

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
NESTED = {"full_attention": {"rope_type": "default"}, "rope_theta": 1e6}
REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA_31_8B, {"model_type": "mixtral", "architectures": None}, "mixtral"),
    (LLAMA_31_8B, {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClass"),
    (
        LLAMA_31_8B,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config",
    ),
    (LLAMA_31_8B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    (LLAMA_31_8B, {"rope_scaling": MROPE}, "mrope"),
    (LLAMA_31_8B, {"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor"),
    (LLAMA_31_8B, {"rope_scaling": {"type": "linear", "factor": 8.0, "alpha": 2}}, "alpha"),
    (LLAMA_31_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA_31_8B, {"rope_interleaved": True}, "rope_interleaved"),
    (LLAMA_31_8B, {"sliding_window": 4096}, "sliding_window"),
    (LLAMA_31_8B, {"hidden_act": "relu2"}, "hidden_act"),
    (LLAMA_31_8B, {"logit_scale": 0.0625}, "logit_scale"),
    (LLAMA_31_8B, {"residual_multiplier": 1.0}, "residual_multiplier"),
    (LLAMA_31_8B, {"num_local_experts": 8}, "num_local_experts"),
    (LLAMA_31_8B, {"clip_qkv": 8.0}, "clip_qkv"),
    (LLAMA_31_8B, {"is_encoder_decoder": True}, "is_encoder_decoder"),
    (LLAMA_31_8B, {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
    (LLAMA_31_8B, {"layer_types": ["linear_attention"] * 32}, "linear_attention"),
    (LLAMA_31_8B, {"mystery\nnewline": False}, "mystery"),
    (MISTRAL_V01, {"attention_bias": True}, "attention_bias"),
    (QWEN25_7B, {"attention_bias": False}, "attention_bias"),
    (QWEN25_7B, {"layer_types": ["chunked_attention"] * 28}, "chunked_attention"),
    (GEMMA2_9B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA2_9B, {"sliding_window_size": 128}, "sliding_window_size"),
    (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (GEMMA3_1B, {"rope_parameters": NESTED}, "rope_parameters.rope_theta"),
    (GEMMA3_1B, {"mlp_bias": True}, "mlp_bias"),
    (GEMMA3_4B, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (GEMMA3_4B, {"text_config": {"altup_num_inputs": 4}}, "text_config.altup_num_inputs"),
    (PHI3_MINI_4K, {"rope_scaling": LONGROPE}, "longrope"),
    (PHI3_MINI_4K, {"rope_scaling": LONGROPE | {"type": "su"}}, "su"),
    (PHI3_MINI_4K, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    (OLMO2_7B, {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
]


@pytest.mark.parametrize(("base", "change", "text"), REFUSALS)
def test_what_changes_the_maths_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], text: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load(base, **change)
    assert_one_line(caught.value, text)


def assert_one_line(error: JaxinferError, text: str) -> None:
    message = str(error)
    assert message.startswith("x/config.json: ") or message.startswith("x.gguf: ")
    assert text in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (LLAMA_31_8B, {"pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False}),
        (LLAMA_31_8B, {"dtype": "bfloat16", "torch_dtype": ..., "unsloth_fixed": True}),
        (LLAMA_31_8B, {"layer_types": ["full_attention"] * 32, "clip_qkv": None}),
        (LLAMA_2_7B, {"rope_scaling": {}, "rope_theta": 10000, "num_key_value_heads": None}),
        (MISTRAL_V01, {"layer_types": ["sliding_attention"] * 32, "head_dim": None}),
        (PHI3_MINI_4K, {"resid_pdrop": 0.5, "partial_rotary_factor": 1}),
        (QWEN3_8B, {"layer_types": ["full_attention"] * 36, "temperature": 0.6}),
    ],
)
def test_what_does_not_change_the_maths_is_ignored(
    base: dict[str, Any], change: dict[str, Any]
) -> None:
    assert load(base, **change) == load(base)


# --- Malformed files -----------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
LLAMA3 = LLAMA_31_8B["rope_scaling"]
YARN = {"type": "yarn", "factor": 4.0}
MALFORMED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *((LLAMA_31_8B, {"num_hidden_layers": v}, "num_hidden_layers") for v in (0, -1, True, "32")),
    *((LLAMA_31_8B, {"num_hidden_layers": v}, "num_hidden_layers") for v in (1001, 2.5, None, [])),
    *((LLAMA_31_8B, {"vocab_size": v}, "vocab_size") for v in (0, 10_000_001, 1e3, NAN, {"a": 1})),
    *((LLAMA_31_8B, {"hidden_size": v}, "hidden_size") for v in (-4096, 10**12, 10**300, 4095)),
    *((LLAMA_31_8B, {"intermediate_size": v}, "intermediate_size") for v in (0, False, INF)),
    *((LLAMA_31_8B, {"num_attention_heads": v}, "num_attention_heads") for v in (0, 10**9, "x")),
    *((LLAMA_31_8B, {"num_key_value_heads": v}, "num_key_value_heads") for v in (0, 5, 64, -8)),
    *((LLAMA_31_8B, {"head_dim": v}, "head_dim") for v in (0, 127, -2, "128", 2**21)),
    *((LLAMA_31_8B, {"max_position_embeddings": v}, "max_position") for v in (0, 2**31, 1.5)),
    *((LLAMA_31_8B, {"rms_norm_eps": v}, "rms_norm_eps") for v in (0, -1e-5, NAN, INF, "1e-5", 2)),
    *(
        (LLAMA_31_8B, {"rope_theta": v}, "rope_theta")
        for v in (0, -1, NAN, INF, True, "1", 10**400)
    ),
    *((LLAMA_31_8B, {"rope_scaling": v}, "rope_scaling") for v in ("linear", 8, [8.0], True)),
    *((LLAMA_31_8B, {"tie_word_embeddings": v}, "tie_word_embeddings") for v in (0, "false", None)),
    *((LLAMA_31_8B, {"attention_bias": v}, "attention_bias") for v in (1, "no", None)),
    *((LLAMA_31_8B, {"hidden_act": v}, "hidden_act") for v in (None, 3, ["silu"])),
    *((LLAMA_31_8B, {"architectures": v}, "architectures") for v in ("LlamaForCausalLM", [1])),
    *((LLAMA_31_8B, {"model_type": v}, "model_type") for v in (7, ["llama"], "mistral")),
    (LLAMA_31_8B, {"model_type": ..., "architectures": None}, "model_type"),
    *((LLAMA_31_8B, {"rope_scaling": LLAMA3 | {"factor": v}}, "factor") for v in (0, None, NAN)),
    (LLAMA_31_8B, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    (LLAMA_31_8B, {"rope_scaling": LLAMA3 | {"rope_type": 3}}, "rope_type"),
    (LLAMA_31_8B, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    (LLAMA_31_8B, {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast"),
    (LLAMA_31_8B, {"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor"),
    (LLAMA_31_8B, {"rope_scaling": YARN | {"truncate": 1}}, "truncate"),
    (LLAMA_31_8B, {"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max"),
    *(
        (MISTRAL_V01, {"sliding_window": v}, "sliding_window")
        for v in (0, -1, "4096", 4096.0, True)
    ),
    *((QWEN3_8B, {"layer_types": v}, "layer_types") for v in ("full", ["full_attention"] * 35)),
    (QWEN3_8B, {"layer_types": [["full_attention"]] * 36}, "layer_types"),
    (QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}, "sliding_window"),
    (QWEN3_8B, {"max_window_layers": -1}, "max_window_layers"),
    (QWEN3_8B, {"use_sliding_window": 1}, "use_sliding_window"),
    (GEMMA2_9B, {"sliding_window": None, "sliding_window_size": ...}, "sliding_window"),
    *(
        (GEMMA2_9B, {"attn_logit_softcapping": v}, "attn_logit_softcapping")
        for v in (0, -50.0, "a")
    ),
    *((GEMMA2_9B, {"query_pre_attn_scalar": v}, "query_pre_attn_scalar") for v in (0, None, -256)),
    *((GEMMA3_1B, {"sliding_window_pattern": v}, "sliding_window_pattern") for v in (0, 1.5, "6")),
    (GEMMA3_1B, {"rope_local_base_freq": -1}, "rope_theta"),
    (GEMMA3_1B, {"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention"),
    *((GEMMA3_4B, {"text_config": v}, "text_config") for v in (None, "x", [], {})),
    (GEMMA3_4B, {"text_config": {"hidden_size": 0}}, "text_config.hidden_size"),
    *((PHI3_MINI_4K, {"partial_rotary_factor": v}, "partial_rotary") for v in (0, 2, NAN, 0.27)),
    *((SMOLLM3_3B, {"no_rope_layers": v}, "no_rope_layers") for v in ([1] * 35, [2] * 36, "no")),
    (SMOLLM3_3B, {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
]


@pytest.mark.parametrize(("base", "change", "text"), MALFORMED)
def test_malformed_config(base: dict[str, Any], change: dict[str, Any], text: str) -> None:
    with pytest.raises(CorruptFile) as caught:
        load(base, **change)
    assert_one_line(caught.value, text)


@pytest.mark.parametrize("config", [[], "x", None, 3])
def test_config_that_is_no_object(config: Any) -> None:
    with pytest.raises(CorruptFile) as caught:
        config_from_hf(config, where="x/config.json")
    assert_one_line(caught.value, "expected an object")


def test_messages_stay_short() -> None:
    with pytest.raises(CorruptFile) as caught:
        load(LLAMA_31_8B, hidden_size="9" * 1_000_000)
    assert_one_line(caught.value, "hidden_size")
    with pytest.raises(UnsupportedModel) as refused:
        load(LLAMA_31_8B, **{"z" * 100_000: "y" * 100_000})
    assert_one_line(refused.value, "zzz")


ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**400, 0.5, -0.0, NAN, INF, "", "x", b"x"),
    *([], {}, [1], ["x"] * 40, [None] * 40, {"x": 1}, [[[]]], {"rope_type": "yarn"}, 2**63),
]


@pytest.mark.parametrize(
    "sample", [LLAMA_31_8B, QWEN25_7B, GEMMA2_9B, GEMMA3_1B, GEMMA3_4B, PHI3_MINI_4K, SMOLLM3_3B]
)
def test_no_value_of_any_field_escapes_as_another_error(sample: dict[str, Any]) -> None:
    scaling = sample.get("rope_scaling") or {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}
    for inner in ("rope_scaling", "rope_parameters", "text_config"):
        for key, value in itertools.product([*scaling, "truncate", "full_attention"], ODD):
            changed = sample | {inner: scaling | {key: value}}
            assert "\n" not in refusal(config_from_hf, changed, where="x/config.json")
    for key, value in itertools.product([*sample, "layer_types", "unheard_of"], ODD):
        for rest in (sample, {"model_type": sample["model_type"]}):
            assert "\n" not in refusal(config_from_hf, rest | {key: value}, where="x/config.json")


def refusal(translate: Callable[..., ModelConfig], *args: Any, **kwargs: Any) -> str:
    """The message of the refusal; empty where the file is taken."""
    try:
        translate(*args, **kwargs)
    except JaxinferError as error:
        return str(error)
    return ""


# --- transformers itself -------------------------------------------------------------------------

CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "olmo2": "Olmo2Config",
    "smollm3": "SmolLM3Config",
}
TINY = {
    **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 7},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 64},
}
LLAMA3_TINY = LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 5e5}
YARN_TINY = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
YARN_FULL = YARN_TINY | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CLASSES),
    *((name, TINY) for name in CLASSES),
    ("llama", TINY | {"head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    ("llama", TINY | {"rope_parameters": LLAMA3_TINY, "tie_word_embeddings": True}),
    ("llama", TINY | {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    ("llama", TINY | {"rope_parameters": YARN_TINY}),
    ("llama", TINY | {"rope_parameters": YARN_FULL | {"mscale": 0.7, "mscale_all_dim": 0.9}}),
    ("llama", TINY | {"rope_parameters": YARN_FULL | {"attention_factor": 1.7}}),
    ("mistral", TINY | {"sliding_window": None, "head_dim": 16}),
    ("qwen2", TINY | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    ("qwen3", TINY | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3", TINY | {"attention_bias": True, "rope_parameters": YARN_TINY}),
    ("gemma2", TINY | {"query_pre_attn_scalar": 9, "attn_logit_softcapping": None}),
    ("gemma2", TINY | {"sliding_window": 6, "layer_types": ["full_attention"] * 7}),
    ("gemma3_text", TINY | {"sliding_window": 6, "final_logit_softcapping": 20.0}),
    ("gemma3_text", TINY | {"sliding_window_pattern": 3, "tie_word_embeddings": False}),
    ("gemma3_text", TINY | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("phi3", TINY | {"sliding_window": 9, "hidden_size": 64, "partial_rotary_factor": 0.5}),
    ("olmo2", TINY | {"attention_bias": True, "rope_parameters": {"rope_theta": 77.0}}),
    ("smollm3", TINY | {"no_rope_layer_interval": 3}),
    ("smollm3", TINY | {"no_rope_layers": [0, 1] * 4, "attention_bias": True}),
    ("smollm3", TINY | {"use_sliding_window": True, "sliding_window": 3}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_what_transformers_writes(name: str, settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    hf = getattr(transformers, CLASSES[name])(**copy.deepcopy(settings))
    for use_diff in (True, False):
        c = load(json.loads(hf.to_json_string(use_diff=use_diff)))
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        assert dims(c)[:7] == (
            *(hf.vocab_size, hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers),
            *(hf.num_attention_heads, hf.num_key_value_heads, head_dim),
        )
        assert c.norm_eps == hf.rms_norm_eps
        assert c.tied == hf.tie_word_embeddings
        assert c.qkv_bias == (name == "qwen2" or getattr(hf, "attention_bias", False))
        assert c.out_bias == getattr(hf, "attention_bias", False)
        assert c.mlp_bias == getattr(hf, "mlp_bias", False)
        assert c.attention_scale == getattr(hf, "query_pre_attn_scalar", head_dim) ** -0.5
        assert c.logit_softcap == getattr(hf, "final_logit_softcapping", None)
        assert c.attention_softcap == getattr(hf, "attn_logit_softcapping", None)
        types = getattr(hf, "layer_types", None)
        if types is None:
            types = ["sliding_attention" if getattr(hf, "sliding_window", None) else "full"] * 999
        sliding = [t == "sliding_attention" for t in types[: hf.num_hidden_layers]]
        assert windows(c) == [hf.sliding_window if s else None for s in sliding]
        rotates = getattr(hf, "no_rope_layers", [1] * hf.num_hidden_layers)
        assert [x.rope is not None for x in c.layers] == [bool(r) for r in rotates[: len(c.layers)]]


@pytest.mark.parametrize("name", CLASSES)
def test_absent_fields_have_the_defaults_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    hf = getattr(transformers, CLASSES[name])()
    assert load({"model_type": name}) == load(json.loads(hf.to_json_string(use_diff=False)))


def test_gemma3_with_vision_as_transformers_writes_it() -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.Gemma3Config(text_config={"num_hidden_layers": 3, "sliding_window": 4})
    c = load(json.loads(hf.to_json_string(use_diff=False)))
    assert windows(c) == [4, 4, 4]
    assert c.tied


@pytest.mark.parametrize(("name", "settings"), [s for s in SETTINGS if s[0] != "smollm3"])
def test_rotary_frequencies_are_those_of_transformers(name: str, settings: dict[str, Any]) -> None:
    """The translation is right when the angles are, whatever the fields are called."""
    pytest.importorskip("transformers")
    import importlib

    import transformers

    hf = getattr(transformers, CLASSES[name])(**copy.deepcopy(settings))
    c = load(json.loads(hf.to_json_string(use_diff=False)))
    module = name.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    cls = CLASSES[name].removesuffix("Config").removesuffix("Text") + "RotaryEmbedding"
    reference = getattr(modeling, cls)(hf)
    for layer in c.layers:
        assert layer.rope is not None
        which = ""
        if name == "gemma3_text":
            which = "full_attention_" if layer.window is None else "sliding_attention_"
        expected = getattr(reference, f"{which}inv_freq").numpy()
        np.testing.assert_allclose(rotary.frequencies(layer.rope), expected, rtol=2e-6)
        gain = getattr(reference, f"{which}attention_scaling")
        assert layer.rope.attention_factor == pytest.approx(gain, rel=1e-12)


# --- GGUF ----------------------------------------------------------------------------------------

SHAPES = {"token_embd.weight": (61, 24)}
KEYS: dict[str, Any] = {
    "embedding_length": 24,
    "feed_forward_length": 40,
    "block_count": 7,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 64,
    "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "rope.freq_base": 10000.0,
}


def gguf(
    arch: str,
    shapes: dict[str, tuple[int, ...]] | None = None,
    rope_factors: Any = None,
    **keys: Any,
) -> ModelConfig:
    """A small GGUF of this architecture; `__` in a key stands for a dot, `...` takes it away."""
    own = KEYS | {k.replace("__", "."): v for k, v in keys.items()}
    metadata = {f"{arch}.{k}": v for k, v in own.items() if v is not ...}
    metadata |= {"general.architecture": arch, "general.name": "x", "tokenizer.ggml.model": "gpt2"}
    return config_from_gguf(
        metadata, SHAPES | (shapes or {}), where="x.gguf", rope_factors=rope_factors
    )


def test_gguf_of_smollm2(smollm2_path: str) -> None:
    from jaxinfer.checkpoint.gguf import GGUFFile

    file = GGUFFile(smollm2_path)
    assert config_from_gguf(file.metadata, file.shapes, where="x.gguf") == load(SMOLLM2)


def test_gguf_of_gemma3(gemma3_path: str) -> None:
    from jaxinfer.checkpoint.gguf import GGUFFile

    file = GGUFFile(gemma3_path)
    assert config_from_gguf(file.metadata, file.shapes, where="x.gguf") == load(GEMMA3_270M)


def test_gguf_llama() -> None:
    c = gguf("llama", {"output.weight": (61, 24)}, vocab_size=7, rope__dimension_count=6)
    assert dims(c) == (61, 24, 40, 7, 4, 2, 6, 64)
    assert c.norm_eps == 1e-6
    assert not c.tied
    assert gguf("llama").tied
    assert ropes(gguf("llama", rope__freq_base=...)) == {Rope(1e4, 6)}
    assert gguf("llama", attention__head_count_kv=...).num_kv_heads == 4
    assert gguf("llama", attention__key_length=8, attention__value_length=8).head_dim == 8
    assert windows(gguf("llama", attention__sliding_window=9)) == [9] * 7
    biased = gguf("llama", {f"blk.0.{n}.bias": (1,) for n in ("attn_q", "attn_output", "ffn_up")})
    assert (biased.qkv_bias, biased.out_bias, biased.mlp_bias) == (True, True, True)


def test_gguf_llama3_factors() -> None:
    factors = (1.0, 4.5, 8.0)
    c = gguf("llama", {"rope_freqs.weight": (3,)}, np.asarray(factors, np.float32))
    assert ropes(c) == {Rope(1e4, 6, "factors", factors=factors)}
    with pytest.raises(InvalidArgument):
        gguf("llama", {"rope_freqs.weight": (3,)})
    for bad in ((1.0, 2.0), (1.0, 0.0, 1.0), (1.0, NAN, 1.0)):
        with pytest.raises(CorruptFile):
            gguf("llama", {"rope_freqs.weight": (3,)}, bad)


def test_gguf_scalings() -> None:
    linear = gguf("llama", rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert ropes(linear) == {Rope(1e4, 6, "linear", 4.0)}
    assert ropes(gguf("llama", rope__scale_linear=4.0)) == ropes(linear)
    off = gguf("llama", rope__scaling__type="none", rope__scaling__factor=4.0)
    assert ropes(off) == {Rope(1e4, 6)}
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    yarn["rope__scaling__original_context_length"] = 32
    c = gguf("qwen2", **yarn)
    gain = 0.1 * math.log(4) + 1
    assert ropes(c) == {Rope(1e4, 6, "yarn", 4.0, 32, attention_factor=gain)}
    assert c.max_len == 128
    (rope,) = ropes(gguf("qwen2", **yarn, rope__scaling__yarn_attn_factor=1.5))
    assert rope is not None
    assert rope.attention_factor == 1.5
    (rope,) = ropes(gguf("qwen2", **yarn, rope__scaling__yarn_log_multiplier=0.1))
    assert rope is not None
    assert rope.attention_factor == pytest.approx(gain / (0.01 * math.log(4) + 1), rel=1e-6)


def test_gguf_families() -> None:
    q2 = gguf("qwen2", {"blk.0.attn_q.bias": (24,)})
    assert q2.qkv_bias
    q3 = gguf("qwen3", attention__key_length=16, attention__value_length=16)
    assert (q3.qk_norm, q3.head_dim, q3.attention_scale) == ("head", 16, 0.25)
    olmo = gguf("olmo2")
    assert (olmo.qk_norm, olmo.pre_norm, olmo.post_norm) == ("full", False, True)
    smol = gguf("smollm3")
    assert [x.rope is not None for x in smol.layers] == [True, True, True, False] * 1 + [True] * 3
    phi = gguf("phi3", attention__sliding_window=9, rope__dimension_count=4)
    assert windows(phi) == [9] * 7
    assert ropes(phi) == {Rope(1e4, 4)}
    assert windows(gguf("phi3", attention__sliding_window=0)) == [None] * 7


def test_gguf_gemma() -> None:
    g2 = gguf("gemma2", attention__sliding_window=9, attn_logit_softcapping=40.0)
    assert windows(g2) == [9, None, 9, None, 9, None, 9]
    assert (g2.attention_softcap, g2.logit_softcap) == (40.0, 30.0)
    assert windows(gguf("gemma2"))[0] == 4096
    g3 = gguf("gemma3", attention__sliding_window=9, rope__scaling__factor=8.0)
    assert windows(g3) == [9, 9, 9, 9, 9, None, 9]
    assert g3.layers[0].rope == Rope(1e4, 6)
    assert g3.layers[5].rope == Rope(1e4, 6, "linear", 8.0)
    assert (g3.attention_softcap, g3.logit_softcap, g3.qk_norm) == (None, None, "head")
    assert g3.embed_scale == math.sqrt(24)
    assert g3.activation == "gelu_tanh"
    for c in (g2, g3):
        assert c.pre_norm
        assert c.post_norm
        assert c.attention_scale == 6**-0.5
    # The largest ones scale attention by D / N instead of H: the number of layers tells them.
    heads = {"attention__key_length": 8, "attention__value_length": 8}
    assert gguf("gemma2", **heads, block_count=46).attention_scale == 6**-0.5
    assert gguf("gemma3", **heads, block_count=62).attention_scale == 6**-0.5
    assert gguf("gemma3", **heads, block_count=48).attention_scale == 8**-0.5
    period = gguf("gemma3", attention__sliding_window=9, attention__sliding_window_pattern=3)
    assert windows(period) == [9, 9, None, 9, 9, None, 9]
    flags = [True, False, True, True, True, True, False]
    array = gguf("gemma3", attention__sliding_window=9, attention__sliding_window_pattern=flags)
    assert windows(array) == [9, None, 9, 9, 9, 9, None]
    assert gguf("gemma3", rope__freq_base_swa=500.0).num_layers == 7
    assert gguf("gemma3", vision__block_count=27, mm__tokens_per_image=256).num_layers == 7


GGUF_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("mamba", {}, "mamba"),
    ("llama", {"expert_count": 8}, "llama.expert_count"),
    ("llama", {"ssm__state_size": 16}, "llama.ssm.state_size"),
    ("llama", {"attention__clamp_kqv": 8.0}, "llama.attention.clamp_kqv"),
    ("llama", {"attention__scale": 0.1}, "llama.attention.scale"),
    ("llama", {"logit_scale": 0.5}, "llama.logit_scale"),
    ("llama", {"residual_scale": 0.5}, "llama.residual_scale"),
    ("llama", {"embedding_scale": 12.0}, "llama.embedding_scale"),
    ("llama", {"attention__causal": False}, "llama.attention.causal"),
    ("llama", {"use_parallel_residual": True}, "llama.use_parallel_residual"),
    ("llama", {"attention__value_length": 8}, "llama.attention.value_length"),
    ("llama", {"attention__head_count": [4] * 7}, "llama.attention.head_count"),
    ("llama", {"feed_forward_length": np.full(7, 40)}, "llama.feed_forward_length"),
    ("llama", {"rope__scaling__type": "longrope"}, "longrope"),
    ("llama", {"rope__scaling__attn_factor": 1.2}, "llama.rope.scaling.attn_factor"),
    ("llama", {"rope__dimension_sections": [1, 2]}, "llama.rope.dimension_sections"),
    ("llama", {"rope__dimension_count": 4}, "llama.rope.dimension_count"),
    ("llama", {"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping"),
    ("qwen3", {"attention__sliding_window": 9}, "qwen3.attention.sliding_window"),
    ("qwen3", {"pooling_type": 3}, "qwen3.pooling_type"),
    ("olmo2", {"attention__sliding_window": 9}, "olmo2.attention.sliding_window"),
    ("smollm3", {"attention__sliding_window": 9}, "smollm3.attention.sliding_window"),
]


@pytest.mark.parametrize(("arch", "keys", "text"), GGUF_REFUSALS)
def test_gguf_refusals(arch: str, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        gguf(arch, **keys)
    assert_one_line(caught.value, text)


GGUF_MALFORMED: list[tuple[dict[str, Any], str]] = [
    *(({"block_count": v}, "block_count") for v in (0, -1, 1001, "7", True, 7.0, ...)),
    *(({"embedding_length": v}, "") for v in (0, 25, 23, ..., 2**40)),
    *(({"attention.head_count": v}, "attention.head_count") for v in (0, 5, ..., b"4")),
    *(({"attention.head_count_kv": v}, "attention.head_count_kv") for v in (0, 3, 8)),
    *(({"attention.key_length": v}, "attention.key_length") for v in (0, 7, "8")),
    *(({"context_length": v}, "context_length") for v in (0, 2**40, ...)),
    *(({"attention.layer_norm_rms_epsilon": v}, "epsilon") for v in (0.0, NAN, -1.0, 2.0, ...)),
    *(({"rope.freq_base": v}, "rope.freq_base") for v in (0.0, INF, NAN, "x")),
    *(({"rope.dimension_count": v}, "rope.dimension_count") for v in (0, 5, 8)),
    *(({"rope.scaling.factor": v}, "rope.scaling.factor") for v in (-1.0, NAN)),
    ({"rope.scaling.type": 1}, "rope.scaling.type"),
    ({"attention.sliding_window": -1}, "attention.sliding_window"),
]


@pytest.mark.parametrize(("keys", "text"), GGUF_MALFORMED)
def test_malformed_gguf(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(CorruptFile) as caught:
        gguf("llama", **keys)
    assert_one_line(caught.value, text)


def test_no_value_of_any_key_escapes_as_another_error() -> None:
    own = ("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window", "vocab_size")
    own += ("rope.scaling.yarn_beta_fast", "attention.sliding_window_pattern", "rope.freq_base_swa")
    for arch, key in itertools.product(("llama", "gemma3", "phi3"), [*KEYS, *own, "ssm.x"]):
        for value, more in itertools.product(ODD, ({}, {"rope.scaling.type": "yarn"})):
            assert "\n" not in refusal(gguf, arch, **more, **{key.replace(".", "__"): value})


def test_malformed_gguf_tensors_and_patterns() -> None:
    for shape in ((61, 25), (61,), (10_000_001, 24), (0, 24)):
        with pytest.raises(CorruptFile, match="token_embd"):
            gguf("llama", {"token_embd.weight": shape})
    for pattern in ([True] * 6, [1] * 7, np.ones(7, np.int32), 0):
        with pytest.raises(CorruptFile, match="sliding_window_pattern"):
            gguf("gemma3", attention__sliding_window=9, attention__sliding_window_pattern=pattern)
    with pytest.raises(CorruptFile, match=r"general\.architecture"):
        config_from_gguf({}, {}, where="x.gguf")
