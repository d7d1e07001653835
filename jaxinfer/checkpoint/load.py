"""From a path to everything a model is: weights on their devices, config, tokenizer, defaults."""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinfer.checkpoint import generation_config, names, parameters
from jaxinfer.checkpoint.blocks import FORMATS
from jaxinfer.checkpoint.describe import gguf_config
from jaxinfer.checkpoint.gguf import NUMBERS, GGUFFile
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.checkpoint.json_file import read_json
from jaxinfer.checkpoint.orbax import is_orbax, load_orbax
from jaxinfer.checkpoint.placement import (
    Checkpoint,
    flat_specs,
    keep,
    matrix_part,
    nest,
    param_shapes,
    require_room,
    schemes_of,
)
from jaxinfer.checkpoint.safetensors import SafetensorsFiles
from jaxinfer.checkpoint.source import TensorSource
from jaxinfer.config import ModelConfig
from jaxinfer.distributed import is_first
from jaxinfer.errors import InvalidArgument
from jaxinfer.model import Params, param_dtype
from jaxinfer.quantize import Quantized, pack
from jaxinfer.recipes import Recipe, Schemes, is_matrix, matrix_size, on_platform
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import Layout, fit_config, head_sources
from jaxinfer.tokenizer import load_tokenizer, tokenizer_from_gguf

logger = logging.getLogger("jaxinfer")

READERS = 2  # tensors read at once; each holds a few megabytes beside its result


def load_checkpoint(
    path: Path, *, dtype: jnp.dtype, layout: Layout, quantize: Recipe | None = None
) -> Checkpoint:
    """Load a .gguf file, or a folder of safetensors or Orbax.

    Args:
      path: as `hub.resolve` returns it.
      dtype: of the weights; vectors (norms, biases) stay float32.
      layout: how they lie on their devices.
      quantize: None, or how matrices are kept.

    Raises:
      CorruptFile, UnsupportedModel, ModelNotFound, OutOfMemory, InvalidArgument (sizes that
      do not divide).
    """
    if quantize and quantize.stored and path.suffix != ".gguf":
        raise InvalidArgument("quantize=stored keeps the blocks of a .gguf file, which this is not")
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype, layout, quantize)
    if is_orbax(path):
        return load_orbax(path, dtype=dtype, layout=layout, quantize=quantize)
    return _load_safetensors(path, dtype, layout, quantize)


def _load_gguf(path: Path, dtype: jnp.dtype, layout: Layout, quantize: Recipe | None) -> Checkpoint:
    file = GGUFFile(path)
    config = gguf_config(file)
    pieces = names.gguf_pieces(config, file.metadata["general.architecture"])
    names.check(config, pieces, file.shapes, path.name)
    tokenizer = tokenizer_from_gguf(file.metadata)
    config = fit_config(config, layout)
    if quantize and quantize.stored:
        schemes = stored_schemes(file, pieces, config, quantize.platform)
    else:
        schemes = schemes_of(config, quantize)
    stored = bool(quantize and quantize.stored)
    params = read_params(file, pieces, config, dtype, layout, schemes, stored)
    return Checkpoint(params, config, tokenizer, SamplingParams(), tuple(tokenizer.eos_ids))


def _load_safetensors(
    path: Path, dtype: jnp.dtype, layout: Layout, quantize: Recipe | None
) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    description = read_json(folder / "config.json")
    config = config_from_hf(description, where="config.json")
    files = SafetensorsFiles(path)
    pieces = names.hf_pieces(config, names.hf_prefix(files.shapes, where=path.name))
    names.check(config, pieces, files.shapes, path.name)
    if config.tied:
        parameters.check_tied_head(files, pieces["embed/table"])
    tokenizer = load_tokenizer(folder)
    advice = folder / "generation_config.json"
    generation = read_json(advice) if advice.exists() else {}
    ends = {
        *generation_config.eos_ids(description, where="config.json"),
        *generation_config.eos_ids(generation, where=advice.name),
        *tokenizer.eos_ids,
    }
    defaults = generation_config.default_params(generation, where=advice.name)
    config = fit_config(config, layout)
    params = read_params(files, pieces, config, dtype, layout, schemes_of(config, quantize))
    return Checkpoint(params, config, tokenizer, defaults, tuple(sorted(ends)))


def stored_schemes(
    file: GGUFFile, pieces: dict[str, names.Piece], config: ModelConfig, platform: str
) -> Schemes:
    """Of each matrix whose blocks can be kept. Others are widened, and a line says so."""
    if config.checkpoint_heads:
        raise InvalidArgument(
            "quantize=stored: the heads do not divide over the mesh, and blocks cannot be dealt out"
        )
    found, others = {}, set()
    for path, spec in flat_specs(config).items():
        kind = file.types[pieces[path].source]
        outputs = matrix_size(spec.shape, spec.inputs)[0] if is_matrix(path) else 0
        if outputs and kind in FORMATS and outputs % FORMATS[kind].scheme.in_byte == 0:
            found[path] = on_platform(FORMATS[kind].scheme, platform)
        elif kind not in NUMBERS and len(spec.shape) > 1:
            others.add(kind)
    if others:
        logger.warning("quantize=stored: blocks of %s are widened", ", ".join(sorted(others)))
    if not found:
        raise InvalidArgument(f"quantize=stored: {file.path.name} holds no blocks to keep")
    return found


def read_blocks(source: Any, piece: names.Piece, shape: Any) -> Quantized:
    """A matrix of a GGUF file, an entry of `param_shapes`, as it is stored there."""
    raw = source.read_blocks(piece.source, piece.start, piece.stop)
    blocks = FORMATS[source.types[piece.source]].split(raw)

    def lay(x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        x = x.reshape(piece.stop - piece.start, -1)
        if piece.interleaved:
            x = parameters.deinterleave(x, piece.interleaved)
        x = x.reshape(len(x), like.shape[0], -1).swapaxes(0, 1)
        bytes_ = pack(jnp.asarray(x), shape.scheme) if x.shape[2] > 1 else x[:, :, 0]
        return jax.device_put(bytes_, like.sharding)

    offset = None if blocks.offset is None else lay(blocks.offset, shape.offset)
    return dataclasses.replace(
        shape,
        values=lay(blocks.codes, shape.values),
        scale=lay(blocks.scale, shape.scale),
        offset=offset,
    )


def read_params(
    source: TensorSource,
    pieces: dict[str, names.Piece],
    config: ModelConfig,
    dtype: jnp.dtype,
    layout: Layout,
    schemes: Schemes | None = None,
    stored: bool = False,
) -> Params:
    """Read every parameter straight to its devices, a few at a time.

    A process reads the rows of which its own devices hold a part, each byte of a file once at most,
    and keeps what they hold; beside that it holds a few chunks. Stored blocks are read whole.

    Args:
      source: the checkpoint.
      pieces: where each parameter comes from, by the checkpoint's own config.
      config: `sharding.fit_config` of that.
      dtype: of the weights.
      layout: how they lie on their devices.
      schemes: how matrices are kept; they are rounded on the devices.
      stored: they are blocks of a GGUF file, which `schemes` describes, and not rounded.
    """
    specs, heads = flat_specs(config), head_sources(config)
    shapes = param_shapes(config, dtype, layout, schemes)
    require_room(shapes, layout)

    def read(path: str) -> Any:
        if stored and path in (schemes or {}):
            return read_blocks(source, pieces[path], shapes[path])
        spec, piece, where = specs[path], pieces[path], layout.sharding(specs[path].axes)
        places = where.addressable_devices_indices_map(spec.shape)
        # Devices that hold the same part share what is read.
        parts = {str(index): index for index in places.values()}
        wanted = [
            matrix_part(spec, piece.transposed, index or (), heads) for index in parts.values()
        ]
        read = parameters.read_parts(source, piece, param_dtype(path, dtype), wanted)
        shape = where.shard_shape(spec.shape)
        values = {name: x.reshape(shape) for name, x in zip(parts, read, strict=True)}
        # On CPU jax takes the aligned buffer over, elsewhere it copies: nobody else holds it.
        shards = [
            jax.device_put(values[str(index)], device, may_alias=True)
            for device, index in places.items()
        ]
        whole = jax.make_array_from_single_device_arrays(spec.shape, where, shards)
        return keep(whole, shapes[path])

    with ThreadPoolExecutor(READERS) as pool:  # numpy lets go of the lock while it dequantizes
        values = tqdm(
            pool.map(read, specs),
            total=len(specs),
            desc="loading weights",
            unit="tensor",
            leave=False,
            disable=None if is_first() else True,  # None: where stderr is no terminal
        )
        return nest(dict(zip(specs, values, strict=True)))
