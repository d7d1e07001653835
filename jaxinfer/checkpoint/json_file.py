"""Read a JSON object that a stranger wrote."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.source import corrupt, label, one_line, regular_file_size, unreadable
from jaxinfer.errors import ModelNotFound

MAX_BYTES = 64 << 20  # a config has kilobytes, the index of a very large model a few megabytes


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises ModelNotFound where there is no file, CorruptFile where it is no JSON object.
    """
    if not path.exists():
        raise ModelNotFound(f"{label(path)}: is missing; a model folder holds {path.name}")
    if regular_file_size(path) > MAX_BYTES:
        raise corrupt(path, f"is larger than {MAX_BYTES >> 20} MiB")
    try:
        return parse_json(path, path.read_bytes(), "the file")
    except OSError as error:
        raise unreadable(path, error) from None


def parse_json(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """The object in `raw`, in which no name appears twice at any depth."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            raise corrupt(path, f"{what} holds {one_line(counts.most_common(1)[0][0])} twice")
        return out

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise corrupt(path, f"{what} is nested too deeply") from None
    except ValueError as error:  # JSON or UTF-8
        raise corrupt(path, f"{what} is not JSON: {one_line(error, 90)}") from None
    if not isinstance(value, dict):
        raise corrupt(path, f"{what} is not a JSON object")
    return value
