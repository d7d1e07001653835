"""Our own checkpoints: weights by Orbax, which loads them straight to shardings, bit for bit.

    folder/jaxinfer.json    what the model is: config, dtype, defaults, end tokens
    folder/weights/         the parameter tree, an Orbax checkpoint
    folder/tokenizer...     the tokenizer's own files

jaxinfer.json is written last: a folder without it is not a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.checkpoint import config_json
from jaxinfer.checkpoint.fields import Fields
from jaxinfer.checkpoint.generation_config import eos_ids
from jaxinfer.checkpoint.json_file import read_json
from jaxinfer.checkpoint.placement import (
    Checkpoint,
    flat_specs,
    flatten,
    keep_params,
    lay_params,
    nest,
    param_shapes,
    require_room,
)
from jaxinfer.checkpoint.source import label, one_line
from jaxinfer.config import DTYPES, ModelConfig
from jaxinfer.errors import CorruptFile, InvalidArgument
from jaxinfer.quantize import Quantized
from jaxinfer.recipes import (
    Recipe,
    Schemes,
    is_matrix,
    matrix_size,
    on_platform,
    read_scheme,
    scheme_fields,
)
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import Layout, fit_config
from jaxinfer.tokenizer import load_tokenizer, save_tokenizer

DESCRIPTION = "jaxinfer.json"
WEIGHTS = "weights"
FORMAT = 1


def is_orbax(path: Path) -> bool:
    """Whether the folder is a checkpoint of ours."""
    return (path / DESCRIPTION).is_file()


def save_orbax(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a new or empty folder.

    Raises InvalidArgument where the folder holds something, or cannot be written.
    """
    import orbax.checkpoint as ocp

    if checkpoint.config.checkpoint_heads:
        raise InvalidArgument("these weights have heads spread over a mesh: load them without one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InvalidArgument(f"{label(folder)}: is not empty; name a new folder")
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder.absolute() / WEIGHTS, nest(_flat(checkpoint.params)))
        save_tokenizer(checkpoint.tokenizer, folder)
        description = {
            "format": FORMAT,
            "dtype": str(checkpoint.params["embed"]["table"].dtype),
            "quantized": _describe(checkpoint.params),
            "config": dataclasses.asdict(checkpoint.config),
            "sampling": dataclasses.asdict(checkpoint.default_params),
            "eos_token_id": list(checkpoint.eos_ids),
        }
        draft = folder / f"{DESCRIPTION}.tmp"
        draft.write_text(json.dumps(description, indent=1), encoding="utf-8")
        draft.replace(folder / DESCRIPTION)
    except OSError as error:
        raise InvalidArgument(f"{label(folder)}: cannot be written: {error.strerror}") from error


def stored_dtype(folder: Path) -> str:
    """The dtype that the weights were saved in."""
    names = dict(zip(DTYPES, DTYPES, strict=True))
    return Fields(read_json(folder / DESCRIPTION), DESCRIPTION).choice("dtype", None, names)


def is_quantized(folder: Path) -> bool:
    """Whether the weights were saved in few bits."""
    return bool(Fields(read_json(folder / DESCRIPTION), DESCRIPTION).get("quantized", {}))


def load_orbax(
    folder: Path, *, dtype: jnp.dtype, layout: Layout, quantize: Recipe | None = None
) -> Checkpoint:
    """Load what `save_orbax` wrote; weights of another dtype are cast as they are read.

    Raises InvalidArgument where a recipe is asked for and the weights are quantized already.
    """
    where = DESCRIPTION
    fields = Fields(read_json(folder / DESCRIPTION), where)
    fields.only("format", FORMAT, why="not a format this version reads")
    config = config_json.from_fields(fields.table("config"), where)
    sampling = _sampling(fields.get("sampling", {}), where)
    ends = eos_ids(fields.values, where=where)
    held = _schemes(fields.get("quantized", {}), config, layout, where)
    if held and quantize:
        raise InvalidArgument(
            f"{label(folder)}: is quantized already ({sorted(_names(held))[0]}); load it without"
            " quantize, or convert the original anew"
        )
    if held and fit_config(config, layout).checkpoint_heads:
        raise InvalidArgument(
            f"{label(folder)}: is quantized, and its heads do not divide over the mesh: use the"
            " original, or another mesh"
        )
    params = _read_weights(folder / WEIGHTS, config, dtype, layout, held)
    if not held:
        params, config = lay_params(params, config, layout)
    if quantize:
        params = keep_params(params, config, dtype, layout, quantize)
    return Checkpoint(params, config, load_tokenizer(folder), sampling, ends)


def _flat(params: Any) -> dict[str, Any]:
    """Path -> array; a quantized weight is several, each behind its name."""
    leaves = jax.tree.leaves_with_path(params)
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): leaf
        for path, leaf in leaves
    }


def _describe(params: Any) -> dict[str, Any]:
    """Path of each quantized weight -> its scheme, as JSON has it."""
    quantized = {p: leaf for p, leaf in flatten(params).items() if isinstance(leaf, Quantized)}
    return {path: scheme_fields(leaf.scheme) for path, leaf in quantized.items()}


def _schemes(values: Any, config: ModelConfig, layout: Layout, where: str) -> Schemes:
    """What `_describe` wrote, for these devices."""
    known, found = flat_specs(config), {}
    if not isinstance(values, dict):
        raise CorruptFile(f"{where}: quantized: not a table")
    for path, entry in values.items():
        if path not in known or not is_matrix(path) or not isinstance(entry, dict):
            raise CorruptFile(f"{where}: quantized: {one_line(path)} is no matrix of this config")
        try:
            size = matrix_size(known[path].shape, known[path].inputs)
            found[path] = on_platform(read_scheme(entry, *size), layout.platform)
        except InvalidArgument as error:
            raise CorruptFile(f"{where}: quantized: {one_line(path)}: {error}") from error
    return found


def _names(schemes: Schemes) -> set[str]:
    return {"fp8" if s.fp8 else f"int{s.bits}" for s in schemes.values()}


def _sampling(values: Any, where: str) -> SamplingParams:
    try:
        return SamplingParams(**values)
    except (TypeError, InvalidArgument) as error:
        raise CorruptFile(f"{where}: sampling: {one_line(error, 90)}") from error


def _read_weights(
    folder: Path, config: ModelConfig, dtype: jnp.dtype, layout: Layout, schemes: Schemes
) -> Any:
    import orbax.checkpoint as ocp

    fitted = fit_config(config, layout)
    final = param_shapes(fitted, dtype, layout, schemes)
    require_room(final, layout)
    # Heads that are yet to be spread do not divide: until then their weights lie cut along D.
    divides = config.width % layout.parts("N") == 0
    cuts = tuple(("D", along) for letter, along in layout.cuts if letter == "N" and divides)
    aside = dataclasses.replace(layout, cuts=cuts)
    as_saved = final if fitted == config else param_shapes(config, dtype, aside, schemes)
    if not folder.is_dir():
        raise CorruptFile(f"{label(folder)}: is missing; the checkpoint is not whole")
    tree = {p: final[p] if x.shape == final[p].shape else x for p, x in as_saved.items()}
    wanted = _flat(nest(tree))
    with ocp.StandardCheckpointer() as reader:
        try:
            held = _shapes(reader.metadata(folder.absolute()).item_metadata)
        except Exception as error:  # whatever its parsers raise on a file that lies
            raise _broken(folder, error) from error
        for path, like in wanted.items():
            if held.get(path) != like.shape:
                raise CorruptFile(
                    f"{label(folder)}: {path} has shape {held.get(path)};"
                    f" the config asks for {like.shape}"
                )
        if extra := sorted(set(held) - set(wanted)):
            name = one_line(extra[0])
            raise CorruptFile(f"{label(folder)}: {name} is no parameter of this config")
        try:
            read = _flat(reader.restore(folder.absolute(), nest(wanted)))
        except Exception as error:
            raise _broken(folder, error) from error
    return jax.tree.unflatten(jax.tree.structure(nest(tree)), [read[path] for path in wanted])


def _shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(metadata.tree)
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _broken(folder: Path, error: Exception) -> CorruptFile:
    return CorruptFile(f"{label(folder)}: Orbax cannot read it: {one_line(error, 120)}")
