"""GGUF metadata -> ModelConfig: every family, files that lie."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from published_configs import (
    GEMMA3_270M,
    INF,
    NAN,
    ODD,
    SMOLLM2,
    assert_one_line,
    dims,
    load,
    refusal,
    ropes,
    windows,
)

from jaxinfer.checkpoint.gguf_config import config_from_gguf
from jaxinfer.config import ModelConfig, Rope
from jaxinfer.errors import CorruptFile, InvalidArgument, UnsupportedModel

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
