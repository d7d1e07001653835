"""The tables of a plan: model shapes against published counts and files, and chips for their units.

No test here needs the TPU compiler.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import pytest
from published_configs import (
    GEMMA2_9B,
    GEMMA3_1B,
    GEMMA3_4B,
    GEMMA3_270M,
    LLAMA_31_8B,
    MISTRAL_V01,
    MISTRAL_V03,
    OLMO2_7B,
    PHI3_MINI_4K,
    QWEN3_8B,
    QWEN25_7B,
    SMOLLM2,
    SMOLLM3_3B,
    load,
)

from jaxinfer.checkpoint.presets import PRESETS, preset
from jaxinfer.config import Rope
from jaxinfer.errors import InvalidArgument
from jaxinfer.hardware import CHIPS, TOPOLOGIES, TOPOLOGY_OPTIONS, Chip
from jaxinfer.model import ParamSpec, param_specs

# --- Models --------------------------------------------------------------------------------------


def vision(width: int) -> int:
    """Parameters of Gemma 3's image side: SigLIP (27 layers of 1152, 4304), and a projection."""
    attention = 4 * (1152 * 1152 + 1152)
    mlp = 1152 * 4304 + 4304 + 4304 * 1152 + 1152
    layers = 27 * (attention + mlp + 2 * 2 * 1152)
    embed = 14 * 14 * 3 * 1152 + 1152 + 4096 * 1152
    return layers + embed + 2 * 1152 + 1152 * width + 1152


# What the model hub counts in each model's safetensors, less what is not in a text model's shapes.
COUNTS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 751_632_384 - 151936 * 1024,  # these two files hold the tied head once more
    "qwen3-1.7b": 2_031_739_904 - 151936 * 2048,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.1": 7_241_732_096,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - vision(2560),
    "gemma-3-12b": 12_187_325_040 - vision(3840),
    "gemma-3-27b": 27_432_406_640 - vision(5376),
    "phi-3-mini": 3_821_079_552,
    "olmo-2-7b": 7_298_617_344,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
}


def test_every_preset_has_a_published_count() -> None:
    assert COUNTS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name: str) -> None:
    specs = param_specs(preset(name))
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    assert sum(math.prod(spec.shape) for spec in leaves) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-3.1-8b", LLAMA_31_8B),
        ("qwen2.5-7b", QWEN25_7B),
        ("qwen3-8b", QWEN3_8B),
        ("mistral-7b", MISTRAL_V03),
        ("mistral-7b-v0.1", MISTRAL_V01),
        ("gemma-2-9b", GEMMA2_9B),
        ("gemma-3-270m", GEMMA3_270M),
        ("gemma-3-1b", GEMMA3_1B),
        ("gemma-3-4b", GEMMA3_4B),
        ("phi-3-mini", PHI3_MINI_4K),
        ("olmo-2-7b", OLMO2_7B),
        ("smollm2-135m", SMOLLM2),
        ("smollm3-3b", SMOLLM3_3B),
    ],
)
def test_same_as_the_published_file(name: str, published: dict[str, Any]) -> None:
    assert preset(name) == load(published)


def test_context() -> None:
    """Tokens: what no parameter count can see."""
    expected = {"llama-3-8b": 8192, "llama-3-70b": 8192, "qwen2.5-0.5b": 32768}
    expected |= {f"llama-{name}": 131072 for name in ("3-405b", "3.1-70b", "3.2-1b", "3.2-3b")}
    expected |= {f"qwen3-{size}b": 40960 for size in ("0.6", "1.7", "4", "14", "32")}
    expected |= {"gemma-2-2b": 8192, "gemma-2-27b": 8192}
    expected |= {"gemma-3-12b": 131072, "gemma-3-27b": 131072}
    assert {name: preset(name).max_len for name in expected} == expected


def test_rotary_embeddings() -> None:
    def rope(name: str, layer: int = -1) -> Rope | None:
        return preset(name).layers[layer].rope

    plain = Rope(500000.0, 128)
    stretched = Rope(500000.0, 128, "llama3", 8.0, 8192)
    assert rope("llama-3-8b") == rope("llama-3-70b") == plain
    assert rope("llama-3.1-70b") == rope("llama-3-405b") == stretched
    assert rope("llama-3.2-1b") == Rope(500000.0, 64, "llama3", 32.0, 8192)
    assert rope("llama-3.2-3b") == Rope(500000.0, 128, "llama3", 32.0, 8192)
    for size in ("0.6b", "1.7b", "4b", "14b", "32b"):
        assert rope(f"qwen3-{size}") == Rope(1e6, 128)
    assert rope("qwen2.5-0.5b") == Rope(1e6, 64)
    for name, width in (("gemma-3-12b", 256), ("gemma-3-27b", 128)):
        assert rope(name, 0) == Rope(1e4, width)
        assert rope(name, 5) == Rope(1e6, width, "linear", 8.0)
    assert [layer.rope is None for layer in preset("smollm3-3b").layers] == (
        [False] * 3 + [True]
    ) * 9


def test_windows() -> None:
    def windows(name: str) -> list[int | None]:
        return [layer.window for layer in preset(name).layers]

    assert windows("gemma-2-2b") == [4096, None] * 13
    assert windows("gemma-2-27b") == [4096, None] * 23
    assert windows("gemma-3-12b") == ([1024] * 5 + [None]) * 8
    assert windows("gemma-3-27b") == ([1024] * 5 + [None]) * 10 + [1024] * 2
    assert windows("mistral-7b-v0.1") == [4096] * 32
    assert windows("phi-3-mini") == [2047] * 32
    sliding = {name for name in PRESETS if any(windows(name))}
    assert sliding == {name for name in PRESETS if "gemma" in name} | {
        "mistral-7b-v0.1",
        "phi-3-mini",
    }


def test_heads() -> None:
    odd = {name for name in PRESETS if (c := preset(name)).head_dim * c.num_heads != c.width}
    odd_qwen = {"qwen3-0.6b", "qwen3-4b", "qwen3-32b"}
    assert odd == {name for name in PRESETS if "gemma" in name} | odd_qwen
    # Only these two scale attention by D / N instead of H.
    odd = {name for name in PRESETS if (c := preset(name)).attention_scale != c.head_dim**-0.5}
    assert odd == {"gemma-2-27b", "gemma-3-27b"}
    for name in odd:
        c = preset(name)
        assert c.attention_scale == (c.width / c.num_heads) ** -0.5


def test_norms_biases_and_softcaps() -> None:
    qk_norm = {"qwen3": "head", "gemma3": "head", "olmo2": "full"}
    five = {"llama", "mistral", "phi3"}  # the other families' norm_eps is 1e-6
    for name in PRESETS:
        c = preset(name)
        assert c.qk_norm == qk_norm.get(c.family, "none")
        assert c.norm_eps == (1e-5 if c.family in five else 1e-6)
        assert (c.qkv_bias, c.out_bias, c.mlp_bias) == (c.family == "qwen2", False, False)
        caps = (50.0, 30.0) if c.family == "gemma2" else (None, None)
        assert (c.attention_softcap, c.logit_softcap) == caps
    tied = {name for name in PRESETS if preset(name).tied}
    small = {"llama-3.2-1b", "llama-3.2-3b", "qwen2.5-0.5b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"}
    small |= {"smollm2-135m", "smollm3-3b"}
    assert tied == small | {name for name in PRESETS if "gemma" in name}


def test_unknown_names() -> None:
    assert preset("Llama-3-8B") == preset("llama-3-8b")
    for name, near in (
        ("llama-3-80b", "llama-3-8b"),
        ("llama3-70b", "llama-3-70b"),
        ("qwen-3-8b", "qwen3-8b"),
        ("gemma3-27b", "gemma-3-27b"),
        ("smollm-135m", "smollm2-135m"),
    ):
        with pytest.raises(InvalidArgument, match=f"did you mean .*{near}"):
            preset(name)
    for name in ("", "zzz", "\n", "q" * 100_000):
        with pytest.raises(InvalidArgument, match=r"there are llama-3-8b, .*smollm3-3b") as caught:
            preset(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


# --- Chips ---------------------------------------------------------------------------------------

GIB = 2**30


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
def test_units_of_a_chip(chip: Chip) -> None:
    assert chip.memory_bytes % GIB == 0
    assert 16 * GIB <= chip.memory_bytes <= 192 * GIB
    # v5p alone has more to give than its vendor states: 95.73 GiB of "95".
    assert 0.93 < chip.usable_bytes / chip.memory_bytes < (1.01 if chip.name == "v5p" else 1.0001)
    # A figure in bits, or in sparse operations, falls out of one of these.
    assert 150 < chip.flops / chip.bandwidth < 600
    # 10 to 70 ms to read all of it, but for the small cards with slow memory.
    seconds = chip.memory_bytes / chip.bandwidth
    assert 0.010 < seconds < (0.090 if chip.link_bandwidth is None else 0.045)
    if chip.int8_ops is not None:
        times = {"v4": 1, "rtx-4090": 4}.get(chip.name, 2)
        assert chip.int8_ops / chip.flops == pytest.approx(times, rel=0.015)
    if chip.link_bandwidth is not None:
        assert 0.05 < chip.link_bandwidth / chip.bandwidth < 0.26
    assert chip.kind == ("tpu" if chip.name in TOPOLOGIES else "gpu")
    assert chip.devices == (2 if chip.name == "tpu7x" else 1)
    assert chip.source


def test_compiler_limits() -> None:
    """GiB a device, to the two places that the compiler's refusal shows."""
    shown = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}
    for name, gib in shown.items():
        chip = CHIPS[name]
        assert chip.usable_bytes / chip.devices / GIB == pytest.approx(gib, abs=0.006)


def test_topologies() -> None:
    for name, slices in TOPOLOGIES.items():
        sides = [tuple(map(int, s.split("x"))) for s in slices]
        assert {len(s) for s in sides} == {2 if name.endswith("e") else 3}
        sizes = [math.prod(s) for s in sides]
        assert sizes == sorted(set(sizes))
        assert min(sizes) > 0
        assert all(side in (1, 2, 4, 8, 16) for s in sides for side in s)
    assert "4x4" in TOPOLOGIES["v5e"]
    assert "2x2" in TOPOLOGIES["v6e"]
    assert TOPOLOGY_OPTIONS.keys() <= TOPOLOGIES.keys()


def test_tables_are_read_only() -> None:
    tables: list[Any] = [PRESETS, PRESETS["llama-3-8b"], CHIPS, TOPOLOGIES, TOPOLOGY_OPTIONS]
    for table in tables:
        with pytest.raises(TypeError, match="assignment"):
            table["x"] = None
