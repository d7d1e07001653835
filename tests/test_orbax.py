"""Our own checkpoints: bit for bit there and back, onto a mesh, and what a broken one gets."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxinfer import load
from jaxinfer.checkpoint.config_json import from_fields
from jaxinfer.checkpoint.fields import Fields
from jaxinfer.checkpoint.orbax import DESCRIPTION, WEIGHTS, is_orbax, load_orbax, save_orbax
from jaxinfer.checkpoint.placement import Checkpoint, keep_params
from jaxinfer.cli.main import main
from jaxinfer.config import LayerConfig, Rope
from jaxinfer.errors import CorruptFile, InvalidArgument, JaxinferError
from jaxinfer.model import init_params
from jaxinfer.recipes import make_recipe
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import ONE_DEVICE
from jaxinfer.testing import tiny_config
from jaxinfer.tokenizer import load_tokenizer

YARN = Rope(theta=1e4, dim=8, scaling="yarn", factor=4.0, original_max_len=128)
LAYERS = (LayerConfig(window=5, rope=YARN), LayerConfig())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.BPE({chr(33 + i): i for i in range(64)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    config = tiny_config(layers=LAYERS, qkv_bias=True, tied=False)
    return Checkpoint(
        init_params(config, jax.random.key(0), jnp.bfloat16, std=0.3),
        config,
        load_tokenizer(folder),
        SamplingParams(temperature=0.5, top_k=7, stop=["x"], logit_bias=None),
        (3, 5),
    )


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "model"
    save_orbax(folder, checkpoint)
    return folder


def test_round_trip_is_bit_for_bit(checkpoint, saved):
    assert is_orbax(saved)
    llm = load(saved, dtype="bfloat16")
    assert llm.config == checkpoint.config
    assert llm.default_params == checkpoint.default_params
    assert llm.eos_ids == (3, 5)
    want = jax.tree.leaves_with_path(checkpoint.params)
    got = jax.tree.leaves_with_path(llm.params)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (_, a), (_, b) in zip(want, got, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    assert llm.generate("ABC", max_tokens=4, seed=1).stats.new_tokens > 0


def test_another_dtype_is_cast_as_it_is_read(checkpoint, saved):
    llm = load(saved, dtype="float32")
    table = llm.params["embed"]["table"]
    assert table.dtype == jnp.float32
    np.testing.assert_array_equal(table, checkpoint.params["embed"]["table"].astype(jnp.float32))


def test_a_folder_that_holds_something_is_never_written_into(checkpoint, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InvalidArgument, match="not empty"):
        save_orbax(tmp_path, checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_was_not_finished_is_no_checkpoint(saved, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(saved, half)
    (half / DESCRIPTION).unlink()
    assert not is_orbax(half)
    with pytest.raises(JaxinferError):
        load(half)


def edit(*path, to):
    """A fault: the description with one field set, or removed where `to` is ..."""

    def apply(folder: Path) -> None:
        file = folder / DESCRIPTION
        description = json.loads(file.read_text())
        room = description
        for key in path[:-1]:
            room = room[key]
        if to is ...:
            del room[path[-1]]
        else:
            room[path[-1]] = to
        file.write_text(json.dumps(description))

    return apply


def text(content: str | bytes):
    def apply(folder: Path) -> None:
        (folder / DESCRIPTION).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )

    return apply


def weights(change):
    def apply(folder: Path) -> None:
        change(folder / WEIGHTS)

    return apply


def empty_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")


def flip_data(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(bytes(data))


CONFIG = ("config",)
FAULTS = {
    "empty": text(""),
    "no-json": text("{"),
    "a-list": text("[]"),
    "a-number": text("3"),
    "binary": text(b"\xff\xfe\x00"),
    "deep": text("[" * 100_000),
    "twice": text('{"format": 1, "format": 1}'),
    "huge": text(b" " * (65 << 20)),
    "format-2": edit("format", to=2),
    "format-true": edit("format", to=True),
    "no-config": edit("config", to=...),
    "config-list": edit("config", to=[1]),
    "config-field-missing": edit("config", "width", to=...),
    "config-field-extra": edit("config", "twist", to=3),
    "width-text": edit("config", "width", to="16"),
    "width-zero": edit("config", "width", to=0),
    "width-negative": edit("config", "width", to=-16),
    "width-half": edit("config", "width", to=16.5),
    "width-true": edit("config", "width", to=True),
    "width-absurd": edit("config", "width", to=2**40),
    "width-other": edit("config", "width", to=32),
    "vocab-other": edit("config", "vocab_size", to=65),
    "heads-no-multiple": edit("config", "num_kv_heads", to=3),
    "kv-heads-zero": edit("config", "num_kv_heads", to=0),
    "scale-zero": edit("config", "attention_scale", to=0),
    "scale-nan": edit("config", "attention_scale", to=float("nan")),
    "eps-negative": edit("config", "norm_eps", to=-1e-6),
    "tied-text": edit("config", "tied", to="no"),
    "activation": edit("config", "activation", to="cubed"),
    "qk-norm": edit("config", "qk_norm", to=None),
    "family": edit("config", "family", to=7),
    "layers-none": edit("config", "layers", to=[]),
    "layers-object": edit("config", "layers", to={}),
    "layers-more": edit("config", "layers", to=[{"window": None, "rope": None}] * 3),
    "layers-too-many": edit("config", "layers", to=[{"window": None, "rope": None}] * 2000),
    "layer-number": edit("config", "layers", 0, to=1),
    "window-zero": edit("config", "layers", 0, "window", to=0),
    "rope-list": edit("config", "layers", 0, "rope", to=[]),
    "rope-dim-odd": edit("config", "layers", 0, "rope", "dim", to=3),
    "rope-dim-large": edit("config", "layers", 0, "rope", "dim", to=64),
    "rope-theta": edit("config", "layers", 0, "rope", "theta", to=0.5),
    "rope-scaling": edit("config", "layers", 0, "rope", "scaling", to="magic"),
    "rope-context": edit("config", "layers", 0, "rope", "original_max_len", to=0),
    "rope-factors": edit("config", "layers", 0, "rope", "scaling", to="factors"),
    "rope-factors-text": edit("config", "layers", 0, "rope", "factors", to=["a"]),
    "rope-beta": edit("config", "layers", 0, "rope", "beta_fast", to=0.5),
    "sampling-list": edit("sampling", to=[]),
    "sampling-unknown": edit("sampling", "warmth", to=1),
    "sampling-range": edit("sampling", "temperature", to=-1),
    "eos-text": edit("eos_token_id", to=["a"]),
    "eos-negative": edit("eos_token_id", to=[-1]),
    "eos-absurd": edit("eos_token_id", to=[2**40]),
    "weights-gone": weights(shutil.rmtree),
    "weights-empty": weights(lambda w: [shutil.rmtree(w), w.mkdir()]),
    "weights-metadata-gone": weights(lambda w: (w / "_METADATA").unlink()),
    "weights-metadata-text": weights(lambda w: (w / "_METADATA").write_text("{")),
    "weights-metadata-list": weights(lambda w: (w / "_METADATA").write_text("[]")),
    "weights-manifest-gone": weights(lambda w: (w / "manifest.ocdbt").unlink()),
    "weights-manifest-cut": weights(lambda w: (w / "manifest.ocdbt").write_bytes(b"\x0c\xdb")),
    "weights-data-empty": weights(empty_files),
    "weights-data-flipped": weights(flip_data),
    "tokenizer-gone": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_one_line(saved, tmp_path, fault):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    FAULTS[fault](folder)
    begin = time.perf_counter()
    with pytest.raises(JaxinferError) as error:
        load(folder, dtype="bfloat16")
    assert time.perf_counter() - begin < 2
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400


def test_every_field_of_the_config_survives_json(checkpoint):
    written = json.loads(json.dumps(dataclasses.asdict(checkpoint.config)))
    assert from_fields(Fields(written, "x", "config."), "x") == checkpoint.config
    for name in (k for k, v in written.items() if v is not None):
        broken = {k: v for k, v in written.items() if k != name}
        with pytest.raises(CorruptFile, match=name):
            from_fields(Fields(broken, "x", "config."), "x")


def quantized(checkpoint, text):
    recipe = make_recipe(text, "cpu")
    params = keep_params(
        checkpoint.params, checkpoint.config, jnp.dtype(jnp.bfloat16), ONE_DEVICE, recipe
    )
    return dataclasses.replace(checkpoint, params=params)


@pytest.mark.parametrize("text", ["int8", "embed=none,v/=int8,int4:g8", "int2:g8", "fp8", "w8a8"])
def test_what_orbax_keeps_comes_back_bit_for_bit(checkpoint, text, tmp_path):
    made = quantized(checkpoint, text)
    folder = tmp_path / "model"
    save_orbax(folder, made)
    again = load(folder)
    assert jax.tree.structure(again.params) == jax.tree.structure(made.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    with pytest.raises(InvalidArgument, match="is quantized already"):
        load(folder, quantize="int8")


def test_the_command_converts(saved, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    for source, output, recipe, kind in (
        (saved, first, ["--quantize=int8"], "int8"),
        (first, again, [], "few bits"),
    ):
        command = ["jaxinfer", "convert", f"--model={source}", f"--output={output}", *recipe]
        assert main(command) == 0
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"bytes of weights in {kind}")
    want = load(saved, quantize="int8").params
    for folder in (first, again):
        jax.tree.map(np.testing.assert_array_equal, load(folder).params, want)


def test_a_drafter_that_was_saved_quantized_stays_so(checkpoint, tmp_path):
    save_orbax(tmp_path / "model", checkpoint)
    save_orbax(tmp_path / "small", quantized(checkpoint, "int4:g8"))
    llm = load(tmp_path / "model", quantize="int8", drafter=tmp_path / "small")
    schemes = [
        params["embed"]["table"].scheme.bits
        for params in (llm.params, llm.speculation().drafter.params)
    ]
    assert schemes == [8, 4]


@pytest.mark.parametrize(
    "change",
    [
        *({"bits": 3}, {"bits": "8"}, {"group": 7}, {"group": 0}, {"group": 1.5}, {"digits": 7}),
        *({"bits": 8.0}, {"group": True}, {"fp8": True, "digits": 1}, {"group": 16, "digits": 1}),
        *({"scale_dtype": "object"}, {"zero": 1}, {"more": 1}, {"fp8": True, "zero": True}),
    ],
)
def test_a_scheme_that_a_file_makes_up_is_refused(checkpoint, change, tmp_path):
    made = quantized(checkpoint, "int8")
    folder = tmp_path / "model"
    save_orbax(folder, made)
    text = json.loads((folder / DESCRIPTION).read_text())
    text["quantized"]["embed/table"] |= change
    (folder / DESCRIPTION).write_text(json.dumps(text))
    with pytest.raises(CorruptFile, match="quantized: embed/table"):
        load_orbax(folder, dtype=jnp.dtype(jnp.float32), layout=ONE_DEVICE)
