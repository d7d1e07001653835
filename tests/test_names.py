"""The name maps: every parameter once, fused and permuted rows, and tensors nobody asked for."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer import model, rotary
from jaxinfer.checkpoint import parameters
from jaxinfer.checkpoint.gguf_config import config_from_gguf
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.checkpoint.names import (
    HF_HEADS,
    Piece,
    check,
    gguf_pieces,
    hf_pieces,
    hf_prefix,
    unused,
)
from jaxinfer.checkpoint.parameters import check_tied_head, read_parts
from jaxinfer.config import ModelConfig, Rope
from jaxinfer.errors import CorruptFile, UnsupportedModel

F32 = np.dtype(np.float32)


def read_parameter(source, piece, shape, dtype):
    whole = slice(0, piece.stop - piece.start), slice(0, math.prod(piece.source_shape[1:]))
    return read_parts(source, piece, dtype, [whole])[0].reshape(shape)


TINY = {
    **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied, every bias": {
        **{"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    },
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "attention_bias": True},
    "gemma2": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text untied": {"head_dim": 8, "tie_word_embeddings": False},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"tie_word_embeddings": True},
}


def hf(name: str) -> dict[str, Any]:
    """config.json of a tiny model; the name's first word is its model_type."""
    return TINY | CONFIGS[name] | {"model_type": name.split()[0]}


def config_of(name: str) -> ModelConfig:
    return config_from_hf(hf(name), where="x/config.json")


def tree(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters that the model declares."""
    leaves = jax.tree.leaves_with_path(
        model.param_specs(config), is_leaf=lambda x: isinstance(x, model.ParamSpec)
    )
    return {"/".join(key.key for key in path): spec.shape for path, spec in leaves}


class Fake:
    """A checkpoint in memory that remembers how many rows were asked for at a time."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.path = Path("x.gguf")
        self.tensors = tensors
        self.shapes = {name: t.shape for name, t in tensors.items()}
        self.asked: list[int] = []

    def read(self, name: str, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        self.asked.append(stop - start)
        return self.tensors[name][start:stop].astype(dtype)


# --- Completeness --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_piece_of_its_size(name: str) -> None:
    config = config_of(name)
    shapes = tree(config)
    for pieces in (hf_pieces(config), gguf_pieces(config, config.family)):
        assert pieces.keys() == shapes.keys()
        for path, piece in pieces.items():
            columns = math.prod(piece.source_shape[1:])
            assert (piece.stop - piece.start) * columns == math.prod(shapes[path]), path
            if len(piece.source_shape) == 2:  # our leading axes are the rows, or the columns
                assert piece.transposed == path.endswith("kernel")
                first, last = (columns, piece.stop - piece.start)[:: 1 if piece.transposed else -1]
                lead = next(i for i in range(9) if math.prod(shapes[path][:i]) == first)
                assert math.prod(shapes[path][lead:]) == last, path


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_of_one_tensor_are_all_of_it_and_disjoint(name: str) -> None:
    config = config_of(name)
    for pieces in (hf_pieces(config), gguf_pieces(config, config.family)):
        sources = {piece.source for piece in pieces.values()}
        for source in sources:
            mine = sorted((p for p in pieces.values() if p.source == source), key=lambda p: p.start)
            assert {p.source_shape for p in mine} == {mine[0].source_shape}
            assert mine[0].start == 0
            assert mine[-1].stop == mine[0].source_shape[0]
            for a, b in itertools.pairwise(mine):
                assert a.stop == b.start


CLASSES = {
    **{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    **{"gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "phi3": "Phi3", "olmo2": "Olmo2"},
    "smollm3": "SmolLM3",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    cls = CLASSES[name.split()[0]]
    own = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = getattr(transformers, f"{cls}Config")(**TINY | CONFIGS[name] | own)
    with torch.device("meta"):
        reference = getattr(transformers, f"{cls.removesuffix('Text')}ForCausalLM")(settings)
    shapes = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    config = config_of(name)
    pieces = hf_pieces(config, hf_prefix(shapes))
    check(config, pieces, shapes, "x")
    # transformers reads what it wrote, so a tied head may stand in the file or not.
    ours = {p.source for p in pieces.values()} | ({"lm_head.weight"} if config.tied else set())
    assert set(shapes) == ours


def test_real_gguf_files_have_exactly_these_tensors(smollm2_path: str, gemma3_path: str) -> None:
    from jaxinfer.checkpoint.gguf import GGUFFile

    for path in (smollm2_path, gemma3_path):
        file = GGUFFile(path)
        config = config_from_gguf(file.metadata, file.shapes, where=path)
        pieces = gguf_pieces(config, config.family)
        check(config, pieces, file.shapes, path)
        assert {p.source for p in pieces.values()} == set(file.shapes)


# --- Names that vary -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", HF_HEADS)
def test_prefixes(prefix: str) -> None:
    config = config_of("gemma3_text untied")
    pieces = hf_pieces(config, prefix)
    shapes = {p.source: p.source_shape for p in pieces.values()}
    assert hf_prefix(shapes) == prefix
    assert pieces["layer_2/attn/q/kernel"].source == f"{prefix}layers.2.self_attn.q_proj.weight"
    assert pieces["head/table"].source == HF_HEADS[prefix]
    vision = ("vision_tower.x", "multi_modal_projector.y", "model.vision_tower.x")
    check(config, pieces, shapes | dict.fromkeys(vision, (1,)), "x")


def test_no_embedding_no_prefix() -> None:
    with pytest.raises(CorruptFile, match="embed_tokens"):
        hf_prefix(["transformer.wte.weight"])


def test_gemma_norms_get_their_one_from_transformers_files_only() -> None:
    for name in ("gemma2", "gemma3_text"):
        config = config_of(name)
        ones = {path for path, piece in hf_pieces(config).items() if piece.add_one}
        assert ones == {path for path in tree(config) if path.endswith("/scale")}
        assert not any(piece.add_one for piece in gguf_pieces(config, config.family).values())
    assert not any(piece.add_one for piece in hf_pieces(config_of("olmo2")).values())


def test_gemma_norm_names() -> None:
    hf_map, gguf_map = (
        f(config_of("gemma2")) for f in (hf_pieces, lambda c: gguf_pieces(c, "gemma2"))
    )
    names = {
        "attn_norm": ("input_layernorm", "attn_norm"),
        "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
        "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
        "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
    }
    for path, (theirs, ggml) in names.items():
        assert hf_map[f"layer_0/{path}/scale"].source == f"model.layers.0.{theirs}.weight"
        assert gguf_map[f"layer_0/{path}/scale"].source == f"blk.0.{ggml}.weight"
    llama = hf_pieces(config_of("llama"))["layer_0/mlp_norm/scale"]
    assert llama.source == "model.layers.0.post_attention_layernorm.weight"


# --- Tensors that are missing, misshapen or unknown ----------------------------------------------


def test_check_refuses() -> None:
    config = config_of("llama")
    pieces = hf_pieces(config)
    shapes = {p.source: p.source_shape for p in pieces.values()}
    check(config, pieces, shapes, "x")
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    check(config, pieces, shapes | {buffer: (3,)}, "x")
    missing = {k: v for k, v in shapes.items() if k != "lm_head.weight"}
    with pytest.raises(CorruptFile, match=r"lm_head\.weight is missing"):
        check(config, pieces, missing, "x")
    with pytest.raises(CorruptFile, match=r"norm\.weight has shape \(25,\)"):
        check(config, pieces, shapes | {"model.norm.weight": (25,)}, "x")
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(UnsupportedModel, match=bias):
        check(config, pieces, shapes | {bias: (24,)}, "x")
    deeper = {"model.layers.3.mlp.up_proj.weight": (40, 24), "z": (1,)}
    with pytest.raises(UnsupportedModel, match=r"layers\.3.*1 others"):
        check(config, pieces, shapes | deeper, "x")


def test_unused() -> None:
    tied, untied = config_of("llama tied, every bias"), config_of("llama")
    assert unused(tied, hf_pieces(tied), ["lm_head.weight", "b", "a"]) == ["a", "b"]
    for name in ("vision_tower.x", "language_model.lm_head.weight"):
        assert unused(untied, hf_pieces(untied), [name]) == [name]
    # Factors of the rotary frequencies are read into the config, or else not understood.
    names = ["rope_freqs.weight"]
    assert unused(untied, gguf_pieces(untied, "llama"), names) == names
    keys = {"llama.block_count": 1, "llama.embedding_length": 8, "llama.attention.head_count": 1}
    keys |= {"llama.context_length": 8, "llama.feed_forward_length": 8}
    keys |= {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    shapes = {"token_embd.weight": (9, 8), "rope_freqs.weight": (4,)}
    scaled = config_from_gguf(keys, shapes, where="x", rope_factors=[1, 1, 2, 2])
    assert unused(scaled, gguf_pieces(scaled, "llama"), names) == []


def test_a_tied_head_must_be_the_embedding() -> None:
    table = np.arange(61.0 * 24, dtype=np.float32).reshape(61, 24)
    piece = hf_pieces(config_of("smollm3"))["embed/table"]
    tensors = {piece.source: table}
    check_tied_head(Fake(tensors), piece)
    check_tied_head(Fake(tensors | {"lm_head.weight": table.copy()}), piece)
    for other in (table + 1, table[:60]):
        with pytest.raises(CorruptFile, match="tie_word_embeddings"):
            check_tied_head(Fake(tensors | {"lm_head.weight": other}), piece)


# --- Reading -------------------------------------------------------------------------------------


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k, row by row from its definition."""
    out = np.empty_like(rows)
    h = len(rows) // heads
    for head in range(heads):
        for half in range(2):
            for i in range(h // 2):
                out[head * h + 2 * i + half] = rows[head * h + half * (h // 2) + i]
    return out


@pytest.mark.parametrize("chunk", [1, 8 * 24 * 4, 3 * 8 * 24 * 4 + 5, 1 << 20])
@pytest.mark.parametrize("arch", ["llama", "smollm3", "qwen3"])
def test_interleaved_heads_are_put_back(
    arch: str, chunk: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(parameters, "CHUNK_BYTES", chunk)
    config = config_from_hf(
        TINY | {"model_type": arch, "attention_bias": True, "head_dim": 8}, where="x"
    )
    pieces = gguf_pieces(config, arch)
    order = permuted if arch in ("llama", "smollm3") else lambda rows, heads: rows
    for name, heads in (("q", 4), ("k", 2)):  # grouped queries: k has fewer heads
        kernel = rng.normal(size=(heads * 8, 24)).astype(np.float32)
        bias = rng.normal(size=heads * 8).astype(np.float32)
        source = Fake(
            {
                f"blk.1.attn_{name}.weight": order(kernel, heads),
                f"blk.1.attn_{name}.bias": order(bias, heads),
            }
        )
        got = read_parameter(source, pieces[f"layer_1/attn/{name}/kernel"], (24, heads, 8), F32)
        np.testing.assert_array_equal(got, kernel.T.reshape(24, heads, 8))
        got = read_parameter(source, pieces[f"layer_1/attn/{name}/bias"], (heads, 8), F32)
        np.testing.assert_array_equal(got, bias.reshape(heads, 8))
    assert pieces["layer_1/attn/v/kernel"].interleaved == 0


def test_halves_rotate_as_neighbours_did(rng: np.random.Generator) -> None:
    """The reason for the permutation: rotary over channels 2i, 2i + 1 in the file's own order."""
    rope = Rope(theta=100.0, dim=8)
    x = rng.normal(size=8).astype(np.float32)  # one head in our order
    stored = permuted(x, 1)
    angles = 5 * rotary.frequencies(rope)
    turned = (stored[0::2] + 1j * stored[1::2]) * np.exp(1j * angles)
    neighbours = np.stack([turned.real, turned.imag], axis=1).reshape(8)
    cos, sin = rotary.tables(rope, jnp.full((1, 1), 5))
    halves = np.asarray(rotary.rotate(jnp.asarray(x)[None, None, None], cos, sin)).reshape(8)
    np.testing.assert_allclose(neighbours, permuted(halves, 1), rtol=1e-5, atol=1e-6)


def test_real_q_is_put_back(smollm2_path: str) -> None:
    from jaxinfer.checkpoint.gguf import GGUFFile

    file = GGUFFile(smollm2_path)
    config = config_from_gguf(file.metadata, file.shapes, where=smollm2_path)
    pieces = gguf_pieces(config, "llama")
    for name, heads in (("q", 9), ("k", 3)):
        got = read_parameter(file, pieces[f"layer_3/attn/{name}/kernel"], (576, heads, 64), F32)
        ours = got.reshape(576, -1).T
        stored = file.read(f"blk.3.attn_{name}.weight", 0, heads * 64, F32)
        np.testing.assert_array_equal(permuted(ours, heads), stored)
        assert not np.array_equal(ours, stored)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_fused_tensors_are_split(
    chunk: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(parameters, "CHUNK_BYTES", chunk)
    config = config_of("phi3")
    qkv = rng.normal(size=(24 + 12 + 12, 24)).astype(np.float32)
    gate_up = rng.normal(size=(80, 24)).astype(np.float32)
    for pieces, a, b in (
        (hf_pieces(config), "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"),
        (gguf_pieces(config, "phi3"), "blk.0.attn_qkv", "blk.0.ffn_up"),
    ):
        source = Fake({f"{a}.weight": qkv, f"{b}.weight": gate_up})
        for path, expected in {
            "attn/q": qkv[:24],
            "attn/k": qkv[24:36],
            "attn/v": qkv[36:],
            "mlp/gate": gate_up[:40],
            "mlp/up": gate_up[40:],
        }.items():
            piece = pieces[f"layer_0/{path}/kernel"]
            got = read_parameter(source, piece, expected.T.shape, F32)
            np.testing.assert_array_equal(got, expected.T)


def test_reading_in_chunks_of_any_dtype(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(parameters, "CHUNK_BYTES", 4 * 24 * 7)
    table = rng.normal(size=(61, 24)).astype(np.float32)
    for dtype, rows in ((F32, 7), (np.dtype(ml_dtypes.bfloat16), 14)):
        source = Fake({"t": table})
        got = read_parameter(source, Piece("t", (61, 24), 0, 61), (61, 24), dtype)
        assert got.dtype == dtype
        assert max(source.asked) == rows  # memory beside the result stays near CHUNK_BYTES
        np.testing.assert_array_equal(got, table.astype(dtype))


def test_a_norm_gets_its_one_once(rng: np.random.Generator) -> None:
    scale = rng.normal(size=24).astype(np.float32)
    got = read_parameter(Fake({"t": scale}), Piece("t", (24,), 0, 24, add_one=True), (24,), F32)
    np.testing.assert_array_equal(got, scale + 1)
    got = read_parameter(Fake({"t": scale}), Piece("t", (24,), 0, 24), (4, 6), F32)
    np.testing.assert_array_equal(got, scale.reshape(4, 6))


@pytest.mark.parametrize("size", [1, 3, 64, 1000, 100_000])
def test_memory_is_aligned_so_that_jax_takes_it_over(size: int) -> None:
    for dtype in (F32, np.dtype(ml_dtypes.bfloat16)):
        out = parameters.aligned_empty((size, 2), dtype)
        assert out.ctypes.data % 64 == 0
        assert out.flags.c_contiguous
        assert out.dtype == dtype


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
