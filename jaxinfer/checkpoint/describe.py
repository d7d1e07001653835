"""What a model is, by name, without its weights."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from jaxinfer.checkpoint import config_json, hub
from jaxinfer.checkpoint.fields import MAX_WIDTH, Fields
from jaxinfer.checkpoint.gguf import GGUFFile
from jaxinfer.checkpoint.gguf_config import config_from_gguf
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.checkpoint.json_file import read_json
from jaxinfer.checkpoint.orbax import DESCRIPTION, is_orbax
from jaxinfer.checkpoint.presets import PRESETS, preset
from jaxinfer.config import ModelConfig
from jaxinfer.errors import CorruptFile, ModelNotFound


def describe(name: str | Path, *, cache: Path | None = None) -> ModelConfig:
    """The config of a preset, or of whatever `load` takes; of a repository on the model hub only
    config.json is downloaded.

    Raises:
      JaxinferError: as `hub.resolve` and the readers of configs.
    """
    known = str(name).lower().removesuffix("-instruct")  # of the same shape
    if known in PRESETS:
        return preset(known)
    try:
        path = hub.resolve_config(str(name), cache=cache)
    except ModelNotFound as error:
        near = difflib.get_close_matches(str(name).lower(), PRESETS, n=3) or PRESETS
        raise ModelNotFound(f"{error}; presets: {', '.join(near)}") from error
    if path.suffix == ".gguf":
        return gguf_config(GGUFFile(path))
    if is_orbax(path):
        fields = Fields(read_json(path / DESCRIPTION), DESCRIPTION)
        return config_json.from_fields(fields.table("config"), DESCRIPTION)
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise CorruptFile(f"{folder}: has no config.json")
    return config_from_hf(read_json(folder / "config.json"), where="config.json")


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The config of a GGUF file, with the rotary factors that it keeps as a tensor."""
    factors = None
    shape = file.shapes.get("rope_freqs.weight", ())
    if len(shape) == 1 and shape[0] <= MAX_WIDTH:  # any other, the config refuses by its shape
        factors = file.read("rope_freqs.weight", 0, shape[0], np.dtype(np.float32)).tolist()
    return config_from_gguf(file.metadata, file.shapes, where=file.path.name, rope_factors=factors)
