"""From a repository on the model hub to a folder of its safetensors, json and tokenizer files.

cache/hub/              huggingface_hub's own layout: snapshots/<commit>/ of links into blobs/
cache/snapshots/*.json  one a finished download: its folder and the size of every file.
                        Written last, so that a download cut short is never taken for whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from jaxinfer.checkpoint.store import atomic_file, disk_errors
from jaxinfer.errors import CorruptFile, ModelNotFound, UnsupportedModel

logger = logging.getLogger("jaxinfer")

_T = TypeVar("_T")

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TEXT = (".json", ".jinja", "tokenizer.model", "merges.txt", "vocab.txt")


def cached(repo: str, revision: str | None, cache: Path) -> Path | None:
    """The folder of an earlier download if every file of it is there at its full size, else None.

    A branch is the commit that it was when it was downloaded: nobody is asked.
    """
    try:
        record = json.loads(_record(repo, revision, cache).read_bytes())
        folder = cache / record["folder"]
        files = record["files"]
        whole = all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no record, a damaged one, or a missing file
    return folder if whole else None


def fetch(
    repo: str, revision: str | None, cache: Path, *, endpoint: str | None, seconds: float
) -> Path:
    """Downloads what loading needs of `repo`; an interrupted download goes on where it stopped.

    `seconds` bounds the hub's first answer. Raises ModelNotFound (the hub does not answer or does
    not have it, or not for this user), UnsupportedModel (no safetensors), CorruptFile (a size).
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    label = f"hf://{repo}" + (f"@{revision}" if revision else "")
    with disk_errors(cache):
        (cache / "snapshots").mkdir(parents=True, exist_ok=True)
    sizes, commit = _listing(api, repo, revision, label, seconds)
    names = wanted(label, sizes)
    total = sum(sizes[name] or 0 for name in names)
    logger.warning("%s: downloading %d MB from the model hub", label, total // 10**6)
    files = {}
    with disk_errors(cache, need=total):
        for name in names:
            # By hand, not snapshot_download: its listing knows no time limit (huggingface_hub 2.4).
            for force in (False, True):  # a damaged file of an earlier run is fetched once more
                with _hub_errors(label):
                    path = api.hf_hub_download(
                        repo, name, revision=commit, cache_dir=cache / "hub", force_download=force
                    )
                files[name] = Path(path).stat().st_size
                if sizes[name] in (None, files[name]):
                    break
            else:
                raise CorruptFile(
                    f"{label}: {name} has {files[name]} bytes, the hub says {sizes[name]}"
                )
        # Relative, so that the cache may be moved.
        folder = Path(os.path.relpath(Path(path).parent.resolve(), cache.resolve()))
        record = {"folder": folder.as_posix(), "files": files}
        with atomic_file(_record(repo, revision, cache)) as sink:
            sink.write(json.dumps(record, indent=1).encode())
    return cache / folder


def fetch_config(
    repo: str, revision: str | None, cache: Path, *, endpoint: str | None, seconds: float
) -> Path:
    """Downloads config.json of `repo` and nothing else; the folder that holds it. Raises as `fetch`
    does, ModelNotFound where there is none."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    label = f"hf://{repo}" + (f"@{revision}" if revision else "")
    sizes, commit = _listing(api, repo, revision, label, seconds)
    if "config.json" not in sizes:
        raise ModelNotFound(f"{label}: has no config.json")
    with _hub_errors(label), disk_errors(cache):
        path = api.hf_hub_download(repo, "config.json", revision=commit, cache_dir=cache / "hub")
    return Path(path).parent


def _listing(
    api: Any, repo: str, revision: str | None, label: str, seconds: float
) -> tuple[dict[str, int | None], str]:
    """Size of each file of a repository, and the commit that they are of."""
    with _hub_errors(label):
        info = _within(
            seconds,
            lambda: api.model_info(repo, revision=revision, timeout=seconds, files_metadata=True),
        )
    commit = info.sha or ""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise CorruptFile(f"{label}: the hub names no commit ({commit[:80]!r})")
    return {file.rfilename: file.size for file in info.siblings or ()}, commit


def wanted(label: str, files: Iterable[str]) -> list[str]:
    """The files of a repository that loading needs: those at its root that are no pickles.

    Sub-folders hold other formats of the same weights. Raises UnsupportedModel where there are no
    safetensors, saying what there is instead.
    """
    root = sorted(name for name in files if "/" not in name and "\\" not in name)
    weights = [name for name in root if name.endswith(".safetensors")]
    if any(name.startswith("model") for name in weights):
        # Mistral's repositories hold every weight twice.
        weights = [name for name in weights if not name.startswith("consolidated")]
    if not weights:
        pickles = [name for name in root if name.lower().endswith(PICKLED)]
        ggufs = [name for name in root if name.lower().endswith(".gguf")]
        if pickles:
            raise UnsupportedModel(pickle_refusal(label, pickles[0]))
        if ggufs:
            raise UnsupportedModel(
                f"{label}: holds GGUF files and no safetensors; download one of them "
                f"({ggufs[0]}) and give its path"
            )
        raise UnsupportedModel(f"{label}: holds no safetensors weights")
    return weights + [name for name in root if name.endswith(_TEXT)]


def pickle_refusal(where: str, file: str) -> str:
    """The line that refuses a pickled checkpoint and says what to use instead."""
    return (
        f"{where}: {file} is a pickle, which can run code when it is opened, so it is not opened; "
        "use or make safetensors weights (safetensors.torch.save_file)"
    )


def _record(repo: str, revision: str | None, cache: Path) -> Path:
    """The file that says that a download is whole."""
    return cache / "snapshots" / (quote(f"{repo}@{revision or 'main'}", safe="@") + ".json")


@contextlib.contextmanager
def _hub_errors(label: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line; errors of the disk pass."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        reason = "is gated: accept its terms on its page and log in with 'hf auth login'"
        raise ModelNotFound(f"{label}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"{label}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        reason = "the model hub has no such repository, or it is private"
        raise ModelNotFound(f"{label}: {reason}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ModelNotFound(f"{label}: the model hub answers {status}") from error
    except Exception as error:
        # Any class: the client changes its HTTP library, and so what it raises, between releases.
        network = (ConnectionError, TimeoutError, socket.gaierror)
        if isinstance(error, OSError) and error.errno and not isinstance(error, network):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelNotFound(f"{label}: the model hub does not answer ({reason})") from error


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """call(), or TimeoutError. In a thread: the look-up of a host name knows no time limit."""
    results: queue.SimpleQueue[_T | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(call())
        except BaseException as error:
            results.put(error)

    # A daemon: one that never comes back must not keep the process from ending.
    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(result, BaseException):
        raise result
    return result
