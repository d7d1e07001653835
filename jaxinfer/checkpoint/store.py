"""Writing into the cache: whole files or none, one writer at a time, one line if it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from jaxinfer.errors import JaxinferError

logger = logging.getLogger("jaxinfer")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `target` when the block ends well, and vanishes otherwise."""
    # Not tempfile: its files are private to the user, and a cache may be shared by a group.
    temporary = target.with_name(f"tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())  # the name must never point at bytes that a crash can lose
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Holds the lock file `path`; the system frees it when its holder dies, however it dies."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.warning("%s: another process is downloading it; waiting", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def disk_errors(folder: Path, need: int | None = None) -> Iterator[None]:
    """Turns an OSError into one line; `need`, if known, is the room that the work takes, bytes."""
    try:
        yield
    except OSError as error:
        room = "" if need is None else f" (about {need // 10**6 + 1} MB are needed"
        if room:
            with contextlib.suppress(OSError):
                room += f", {shutil.disk_usage(folder).free // 10**6} MB are free"
            room += ")"
        raise JaxinferError(
            f"{error.filename or folder}: {error.strerror or error}{room}; make room there, or "
            "set JAXINFER_CACHE to a folder that can be written"
        ) from error
