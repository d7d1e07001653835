"""From a path to everything a model is: weights on their devices, config, tokenizer, defaults."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxinfer.checkpoint import generation_config, names, parameters
from jaxinfer.checkpoint.describe import gguf_config
from jaxinfer.checkpoint.gguf import GGUFFile
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
)
from jaxinfer.checkpoint.safetensors import SafetensorsFiles
from jaxinfer.checkpoint.source import TensorSource
from jaxinfer.config import ModelConfig
from jaxinfer.distributed import is_first
from jaxinfer.model import Params, param_dtype
from jaxinfer.quantize import Recipe
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import Layout, fit_config, head_sources
from jaxinfer.tokenizer import load_tokenizer, tokenizer_from_gguf

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
    params = read_params(file, pieces, config, dtype, layout, quantize)
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
    params = read_params(files, pieces, config, dtype, layout, quantize)
    return Checkpoint(params, config, tokenizer, defaults, tuple(sorted(ends)))


def read_params(
    source: TensorSource,
    pieces: dict[str, names.Piece],
    config: ModelConfig,
    dtype: jnp.dtype,
    layout: Layout,
    quantize: Recipe | None = None,
) -> Params:
    """Read every parameter straight to its devices, a few at a time.

    A process reads the rows of which its own devices hold a part, each byte of a file once at most,
    and keeps what they hold; beside that it holds a few chunks.

    Args:
      source: the checkpoint.
      pieces: where each parameter comes from, by the checkpoint's own config.
      config: `sharding.fit_config` of that.
      dtype: of the weights.
      layout: how they lie on their devices.
      quantize: None, or how matrices are kept; that happens on the devices.
    """
    specs, heads = flat_specs(config), head_sources(config)
    shapes = param_shapes(config, dtype, layout, quantize)
    require_room(shapes, layout)

    def read(path: str) -> Any:
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
        return keep(whole, spec, shapes[path])

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
