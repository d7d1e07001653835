"""From a path to everything a model is: weights on their devices, config, tokenizer, defaults."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxinfer.checkpoint import generation_config, names, parameters
from jaxinfer.checkpoint.fields import MAX_WIDTH
from jaxinfer.checkpoint.gguf import GGUFFile
from jaxinfer.checkpoint.gguf_config import config_from_gguf
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.checkpoint.json_file import read_json
from jaxinfer.checkpoint.orbax import is_orbax, load_orbax
from jaxinfer.checkpoint.placement import Checkpoint, flat_specs, nest, placement, require_room
from jaxinfer.checkpoint.safetensors import SafetensorsFiles
from jaxinfer.checkpoint.source import TensorSource
from jaxinfer.config import ModelConfig
from jaxinfer.model import Params, param_dtype
from jaxinfer.sampling import SamplingParams
from jaxinfer.tokenizer import load_tokenizer, tokenizer_from_gguf

READERS = 2  # tensors read at once; each holds a few megabytes beside its result


def load_checkpoint(path: Path, *, dtype: jnp.dtype, mesh: Mesh | None = None) -> Checkpoint:
    """Load a .gguf file, or a folder of safetensors or Orbax.

    Args:
      path: as `hub.resolve` returns it.
      dtype: of the weights; vectors (norms, biases) stay float32.
      mesh: where they go; None: the default device.

    Raises:
      CorruptFile, UnsupportedModel, ModelNotFound, OutOfMemory, InvalidArgument (the mesh).
    """
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype, mesh)
    if is_orbax(path):
        return load_orbax(path, dtype=dtype, mesh=mesh)
    return _load_safetensors(path, dtype, mesh)


def _load_gguf(path: Path, dtype: jnp.dtype, mesh: Mesh | None) -> Checkpoint:
    file = GGUFFile(path)
    factors = None
    shape = file.shapes.get("rope_freqs.weight", ())
    if len(shape) == 1 and shape[0] <= MAX_WIDTH:  # any other, the config refuses by its shape
        factors = file.read("rope_freqs.weight", 0, shape[0], np.dtype(np.float32)).tolist()
    config = config_from_gguf(file.metadata, file.shapes, where=path.name, rope_factors=factors)
    pieces = names.gguf_pieces(config, file.metadata["general.architecture"])
    names.check(config, pieces, file.shapes, path.name)
    tokenizer = tokenizer_from_gguf(file.metadata)
    params = read_params(file, pieces, config, dtype, mesh)
    return Checkpoint(params, config, tokenizer, SamplingParams(), tuple(tokenizer.eos_ids))


def _load_safetensors(path: Path, dtype: jnp.dtype, mesh: Mesh | None) -> Checkpoint:
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
    params = read_params(files, pieces, config, dtype, mesh)
    return Checkpoint(params, config, tokenizer, defaults, tuple(sorted(ends)))


def read_params(
    source: TensorSource,
    pieces: dict[str, names.Piece],
    config: ModelConfig,
    dtype: jnp.dtype,
    mesh: Mesh | None,
) -> Params:
    """Read every parameter and put it on its devices, a few at a time."""
    specs = flat_specs(config)
    require_room(config, specs, dtype, mesh)

    def read(path: str) -> jax.Array:
        dtype_ = param_dtype(path, dtype)
        value = parameters.read_parameter(source, pieces[path], specs[path].shape, dtype_)
        # On CPU jax takes the aligned buffer over, elsewhere it copies: nobody else holds it.
        return jax.device_put(value, placement(specs[path], mesh), may_alias=True)

    with ThreadPoolExecutor(READERS) as pool:  # numpy lets go of the lock while it dequantizes
        values = tqdm(
            pool.map(read, specs),
            total=len(specs),
            desc="loading weights",
            unit="tensor",
            leave=False,
            disable=None,  # where stderr is no terminal
        )
        return nest(dict(zip(specs, values, strict=True)))
