"""What transformers writes, leaves out and computes from its own configs."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from published_configs import LLAMA3, dims, load, windows

from jaxinfer import rotary

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
