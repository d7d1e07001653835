"""config.json -> ModelConfig: every family, both spellings, files that lie."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from published_configs import (
    GEMMA2_9B,
    GEMMA3_1B,
    GEMMA3_4B,
    GEMMA3_270M,
    INF,
    LLAMA3,
    LLAMA_2_7B,
    LLAMA_31_8B,
    MISTRAL_V01,
    MISTRAL_V03,
    NAN,
    ODD,
    OLMO2_7B,
    PHI3_MINI_4K,
    QWEN3_8B,
    QWEN25_7B,
    SMOLLM2,
    SMOLLM3_3B,
    assert_one_line,
    dims,
    load,
    refusal,
    ropes,
    windows,
)

from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.config import Rope
from jaxinfer.errors import CorruptFile, UnsupportedModel

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
