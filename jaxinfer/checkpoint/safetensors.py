"""`SafetensorsFiles`: tensors of one .safetensors file, or of a folder that holds one or many.

The safetensors library judges every header (`safe_open`). The rows themselves are read with
`read_rows`, at the offsets the judged header gives: in numpy the library knows no float8, and it
maps files, whose pages then stay resident. What it lets pass is refused here: FIFOs, duplicate
names, shapes numpy cannot hold. An index is ours to distrust from the first byte.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxinfer.checkpoint.json_file import parse_json
from jaxinfer.checkpoint.source import (
    Extent,
    corrupt,
    label,
    one_line,
    read_rows,
    reason,
    refuse_lfs_pointer,
    regular_file_size,
    unreadable,
)
from jaxinfer.errors import ModelNotFound, UnsupportedModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Beyond any dense model; they bound the time and memory that a header can ask for.
MAX_JSON = 16 << 20  # bytes of a header or an index
MAX_TENSORS = 1 << 16  # in one file
MAX_DIMS = 8

NUMBERS: dict[str, np.dtype] = {
    **{"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")},
    **{"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2")},
    **{"U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2")},
    **{"I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("u1")},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


class SafetensorsFiles:
    """Tensors of a safetensors checkpoint; headers are in memory, data is read when asked for.

    Attributes:
      path: the file or folder.
      types: tensor name -> type as the format spells it, such as "BF16".
      shapes: tensor name -> shape.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the index and the headers.

        Args:
          path: a .safetensors file, or a folder with model.safetensors or, for a sharded
            checkpoint, model.safetensors.index.json.

        Raises ModelNotFound, CorruptFile or UnsupportedModel, each with one line.
        """
        self.path = Path(path)
        self._extents: dict[str, Extent] = {}
        types: dict[str, str] = {}
        for file, promised in _files(self.path).items():
            header = _header(file)
            for name in promised:
                if name not in header:
                    raise corrupt(
                        self.path, f"{INDEX} says {one_line(name)} is in {_short(file)}; it is not"
                    )
            for name, (kind, extent) in header.items():
                if name in types:
                    other = _short(self._extents[name].path)
                    raise corrupt(
                        self.path, f"{one_line(name)} is in both {other} and {_short(file)}"
                    )
                types[name], self._extents[name] = kind, extent
        self.types: Mapping[str, str] = types
        self.shapes: Mapping[str, tuple[int, ...]] = {n: e.shape for n, e in self._extents.items()}

    def read(self, name: str, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """See `TensorSource.read`."""
        return read_rows(self.path, self._extents, name, start, stop, dtype)


def _short(file: Path) -> str:
    return one_line(file.name, 50)


def _files(path: Path) -> dict[Path, list[str]]:
    """The files to read, each with the tensors that the index promises it holds."""
    if path.suffix.lower() in PICKLES:
        raise _pickle(path)
    if not os.path.isdir(path):
        return {path: []}
    if os.path.lexists(path / SINGLE):
        return {_inside(path, SINGLE): []}
    if os.path.lexists(path / INDEX):
        return _shards(path)
    try:
        others = sorted(path.iterdir())
    except OSError as error:
        raise unreadable(path, error) from None
    for file in others:
        if file.suffix.lower() in PICKLES:
            raise _pickle(file)
    raise ModelNotFound(f"{label(path)}: the folder holds neither {SINGLE} nor {INDEX}")


def _pickle(path: Path) -> UnsupportedModel:
    """Such a file runs whatever code its author wrote into it."""
    return UnsupportedModel(
        f"{label(path)}: pickle checkpoints can run code and are never opened;"
        " convert it to safetensors"
    )


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Shard -> names of its tensors, from the index."""
    file = _inside(folder, INDEX)
    size = regular_file_size(file)
    if size > MAX_JSON:
        raise corrupt(file, f"is {size} bytes long, above {MAX_JSON}")
    index = parse_json(file, _read(file, 0, size), "the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise corrupt(file, "weight_map is missing, empty or not an object")
    names: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise corrupt(file, f"weight_map: the shard of {one_line(name)} is not a string")
        names.setdefault(shard, []).append(name)
    return {_inside(folder, shard): tensors for shard, tensors in names.items()}


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused when it is missing or its links lead out of the folder.

    A hub cache keeps models--org--name/snapshots/REV/file as a link to ../../blobs/HASH, which may
    itself be a link to the blobs that all of its models share: both are allowed.
    """
    if name in ("", ".", "..") or any(c in "/\\:\0" for c in name):
        raise corrupt(folder / INDEX, f"shard '{one_line(name)}' is not a plain file name")
    path = folder / name
    if path.suffix.lower() in PICKLES:
        raise _pickle(path)
    try:
        home, target = folder.resolve(), path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise corrupt(folder, f"{one_line(name)} cannot be read: {reason(error)}") from None
    allowed = [home]
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed += [parent.parent / "blobs", parent.parent.parent / "blobs"]
    if not any(target.is_relative_to(place) for place in allowed):
        raise corrupt(folder, f"{one_line(name)} is a link that leads out of the folder")
    return path


def _read(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes at `offset`, both bounded by the caller."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from None


def _header(path: Path) -> dict[str, tuple[str, Extent]]:
    """Type and extent of every tensor in one file."""
    size = regular_file_size(path)
    head = _read(path, 0, 8)
    if len(head) < 8:
        raise corrupt(path, f"is {size} bytes long: too short for a safetensors file")
    refuse_lfs_pointer(path, head)
    length, most = int.from_bytes(head, "little"), min(size - 8, MAX_JSON)
    if length > most:
        raise corrupt(path, f"the header claims {length} bytes, but can have {most} at most")
    _judge(path)
    header = parse_json(path, _read(path, 8, length), "the header")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise corrupt(path, f"holds {len(header)} tensors, above {MAX_TENSORS}")
    return {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _judge(path: Path) -> None:
    """The library's own checks: fields, types, sizes that agree, no gap, no overlap, no excess."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise corrupt(path, one_line(error, 120)) from None


def _entry(
    path: Path, name: str, entry: Mapping[str, Any], start: int, size: int
) -> tuple[str, Extent]:
    """One tensor of a judged header; the data begins at `start`."""
    kind, shape, offset = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0]
    if kind not in NUMBERS:
        raise UnsupportedModel(f"{label(path)}: {one_line(name)} has unsupported type {kind}")
    if len(shape) > MAX_DIMS:
        raise corrupt(path, f"{one_line(name)} has {len(shape)} dimensions, above {MAX_DIMS}")
    # An empty tensor may claim any size in its other dimensions.
    if math.prod(n for n in shape if n) > size:
        raise corrupt(path, f"{one_line(name)} has impossible shape {one_line(shape)}")
    decode = functools.partial(np.ndarray.view, dtype=NUMBERS[kind])
    return kind, Extent(path, start + offset, shape, 1, NUMBERS[kind].itemsize, decode)
