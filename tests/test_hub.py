"""Names, and the model hub: a small hub served here, with huggingface_hub's real client."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import resource
import shutil
import signal
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_wheels import SPAWN, CopyFrom, is_whole, make_alias

from jaxinfer.checkpoint import hub, snapshot
from jaxinfer.errors import (
    CorruptFile,
    InvalidArgument,
    JaxinferError,
    ModelNotFound,
    UnsupportedModel,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = hub.Sources(endpoint="http://127.0.0.1:1")  # a closed port: nobody answers


@dataclasses.dataclass
class FakeHub:
    """One repository, org/tiny, as the hub's HTTP interface shows it. Tests change its fields."""

    files: dict[str, bytes]
    commit: str = COMMIT
    address: str = ""
    status: int = 200  # of every answer
    error: str = ""  # X-Error-Code
    status_of_files: int = 200
    promised: dict[str, int] = dataclasses.field(default_factory=dict)  # sizes that are lies
    cut: int | None = None  # weights stop after so many bytes...
    hang: bool = False  # ... and the connection stays open
    silent: bool = False  # takes the request, never answers
    drip: bool = False  # answers with one header after the other, without end
    asked: list[str] = dataclasses.field(default_factory=list)
    closing: threading.Event = dataclasses.field(default_factory=threading.Event)

    def listing(self) -> bytes:
        sizes = {name: len(data) for name, data in self.files.items()} | self.promised
        siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
        return json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": siblings}).encode()


def handler(fake: FakeHub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            fake.asked.append(f"{self.command} {url}")
            if fake.silent:
                fake.closing.wait(20)
                return
            while fake.drip and not fake.closing.wait(0.05):
                self.send_response(200)
                self.flush_headers()
            if url.startswith("/api/models/"):
                known = url in ("/api/models/org/tiny", "/api/models/org/tiny/revision/v1")
                name, data, status = "", fake.listing(), fake.status if known else 404
            else:
                name = url.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
                data, status = fake.files.get(name, b""), fake.status_of_files
            code = fake.error or ("" if status == 200 else "RepoNotFound")
            start = 0
            if asked := self.headers.get("Range"):
                start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            self.send_response(status)
            if status >= 400:
                self.send_header("X-Error-Code", code)
                data = b""
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if self.command == "GET":
                stop = fake.cut if name.endswith(".safetensors") else None
                self.wfile.write(data[start:stop])
                self.wfile.flush()
                if stop is not None and fake.hang:
                    fake.closing.wait(20)

    return Handler


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    fake = FakeHub(
        files={
            "README.md": b"not wanted",
            "config.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "tokenizer.json": b"{}",
            "tokenizer.model": b"pieces",
            "model.safetensors": os.urandom(1 << 20),
            "consolidated.safetensors": b"the same weights again",
            "pytorch_model.bin": b"pickled",
            "onnx/model.onnx": b"not wanted",
            "original/model.safetensors": b"not wanted",
        }
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(fake))
    server.daemon_threads = True
    fake.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield fake
    fake.closing.set()
    server.shutdown()
    server.server_close()


WANTED = {
    "config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "model.safetensors",
}


def refusal(kind: type[JaxinferError], name: str, **arguments) -> str:
    with pytest.raises(kind) as caught:
        hub.resolve(name, **arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# -- names ---------------------------------------------------------------------------------------


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "here"))
    assert hub.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("JAXINFER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / ".cache/jaxinfer"
    assert not list(tmp_path.iterdir())  # asking makes nothing


def test_local_paths_are_returned_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("org/tiny").mkdir(parents=True)
    Path("weights.gguf").write_bytes(b"")
    Path("weights.SafeTensors").write_bytes(b"")
    for name in ("org/tiny", "./org", "org", "weights.gguf", "weights.SafeTensors", str(tmp_path)):
        assert hub.resolve(name, cache=tmp_path, sources=NOWHERE) == Path(name)
    assert hub.resolve("~/org", sources=NOWHERE) == tmp_path / "org"
    assert "no revision" in refusal(InvalidArgument, "org/tiny", revision="main")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".PKL"])
def test_pickles_are_refused_naming_safetensors(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"")
    line = refusal(UnsupportedModel, str(path))
    assert "safetensors" in line
    assert str(path) in line


@pytest.mark.parametrize("what", ["pipe.gguf", "notes.txt"])
def test_other_files_are_refused(tmp_path, what):
    path = tmp_path / what
    os.mkfifo(path) if what == "pipe.gguf" else path.write_bytes(b"")
    assert "neither a folder nor" in refusal(UnsupportedModel, str(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "no such path"),
        ("gema-3-270m", "did you mean the alias gemma-3-270m?"),
        ("smollm2", "did you mean the alias smollm2-135m-instruct?"),
        ("SmolLM2-135M-Instruct", "did you mean the alias smollm2-135m-instruct?"),
        ("xyzzy", "hf://org/name[@revision]"),
        ("no/such.gguf", "no such file"),
        ("no/such.bin", "no such file"),
        ("/no/such/folder", "no such path"),
        ("a\0b", "no such path"),
        ("x" * 5000, "no such path"),
        ("two\nlines", "no such path"),
        ("hf://", "not of the form"),
        ("hf://tiny", "not of the form"),
        ("hf://org/tiny/more", "not of the form"),
        ("hf://org/..", "not of the form"),
        ("hf://../tiny", "not of the form"),
        ("hf://org/a..b", "not of the form"),
        ("hf://org/a--b", "not of the form"),
        ("hf://org/-a", "not of the form"),
        ("hf://org/a.git", "not of the form"),
        ("hf://org/ti ny", "not of the form"),
        ("hf://org/tiny\n", "not of the form"),
        ("hf://org/tïny", "not of the form"),
        ("hf://org/tiny@", "not of the form"),
        ("hf://org/" + "x" * 97, "not of the form"),
    ],
)
def test_bad_names_are_refused_without_asking_the_hub(tmp_path, fake, name, words):
    sources = hub.Sources(endpoint=fake.address)
    assert words in refusal(ModelNotFound, name, cache=tmp_path, sources=sources)
    assert fake.asked == []


def test_a_config_alone(tmp_path, fake):
    sources = hub.Sources(endpoint=fake.address)
    folder = hub.resolve_config("hf://org/tiny", cache=tmp_path, sources=sources)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_bytes() == fake.files["config.json"]
    whole = hub.resolve("hf://org/tiny", cache=tmp_path, sources=sources)
    assert (whole / "model.safetensors").exists()  # a part was not taken for the whole
    fake.asked.clear()
    assert hub.resolve_config("hf://org/tiny", cache=tmp_path, sources=sources) == whole
    assert fake.asked == []
    assert hub.resolve_config(str(whole)) == whole
    with pytest.raises(InvalidArgument, match="not a branch"):
        hub.resolve_config("hf://org/tiny@../x", cache=tmp_path, sources=sources)
    del fake.files["config.json"]
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        hub.resolve_config("hf://org/tiny", cache=tmp_path / "other", sources=sources)


@pytest.mark.parametrize(
    "revision", ["../../x", "a..b", "-x", "a//b", "a b", "a\n", "x" * 201, ".hidden", "/etc"]
)
def test_bad_revisions(tmp_path, fake, revision):
    sources = hub.Sources(endpoint=fake.address)
    for name, extra in ((f"hf://org/tiny@{revision}", None), ("hf://org/tiny", revision)):
        line = refusal(InvalidArgument, name, cache=tmp_path, sources=sources, revision=extra)
        assert "not a branch, tag or commit" in line
    assert fake.asked == []
    refusal(InvalidArgument, "hf://org/tiny@v1", revision="v2", cache=tmp_path, sources=sources)


def test_wheel_file_knows_aliases_only(tmp_path):
    with pytest.raises(ModelNotFound, match="did you mean the alias gemma-3-270m"):
        hub.wheel_file("gemma", cache=tmp_path)


# -- the hub -------------------------------------------------------------------------------------


def test_download_takes_what_loading_needs_and_asks_once(tmp_path, fake, caplog):
    sources = hub.Sources(endpoint=fake.address)
    folder = hub.resolve("hf://org/tiny", cache=tmp_path, sources=sources)
    assert folder.is_relative_to(tmp_path / "hub")
    assert {path.name for path in folder.iterdir()} == WANTED
    for name in WANTED:
        assert (folder / name).read_bytes() == fake.files[name]
    assert "hf://org/tiny: downloading 1 MB from the model hub" in caplog.text
    # From now on the cache answers, under either form of the name, also after it was moved.
    shutil.move(tmp_path / "hub", tmp_path / "new/hub")
    shutil.move(tmp_path / "snapshots", tmp_path / "new/snapshots")
    for name in ("hf://org/tiny", "org/tiny", "org/tiny@main"):
        again = hub.resolve(name, cache=tmp_path / "new", sources=NOWHERE)
        assert (again / "model.safetensors").read_bytes() == fake.files["model.safetensors"]


def test_revision(tmp_path, fake):
    sources = hub.Sources(endpoint=fake.address)
    folder = hub.resolve("hf://org/tiny@v1", cache=tmp_path, sources=sources)
    assert hub.resolve("org/tiny", revision="v1", cache=tmp_path, sources=NOWHERE) == folder
    assert "does not answer" in refusal(  # v1 in the cache says nothing about main
        ModelNotFound, "org/tiny", cache=tmp_path, sources=NOWHERE
    )
    fake.error = "RevisionNotFound"
    line = refusal(ModelNotFound, "hf://org/tiny@v2", cache=tmp_path, sources=sources)
    assert line == "hf://org/tiny@v2: the repository has no such revision"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": 401}, "no such repository, or it is private"),
        ({"status": 404}, "no such repository, or it is private"),
        ({"status": 403, "error": "GatedRepo"}, "is gated: accept its terms"),
        ({"status_of_files": 403, "error": "GatedRepo"}, "is gated: accept its terms"),
        ({"status": 500, "error": "Oops"}, "the model hub answers 500"),
        ({"silent": True}, "does not answer"),
        ({"drip": True}, "does not answer (no answer within 0.5 s)"),
        ({"address": "http://127.0.0.1:1"}, "does not answer"),
        ({"address": "http://no-such-host.invalid"}, "does not answer"),
    ],
)
def test_hub_that_cannot_serve(tmp_path, fake, change, words):
    """A repository: one line, soon. An alias: the copy in the wheel instead."""
    for field, value in change.items():
        setattr(fake, field, value)
    alias = make_alias(tmp_path / "index")
    sources = hub.Sources(
        aliases={"tiny-model": alias},
        endpoint=fake.address,
        hub_seconds=0.5 if fake.silent or fake.drip else 20,
        download=CopyFrom(tmp_path / "index"),
    )
    started = time.monotonic()
    line = refusal(ModelNotFound, "org/tiny", cache=tmp_path, sources=sources)
    assert words in line
    assert "there is no path 'org/tiny'" in line
    assert "revision" not in line
    assert words in refusal(
        ModelNotFound, "tiny-model", cache=tmp_path, sources=sources, revision="v1"
    )
    assert is_whole(hub.resolve("tiny-model", cache=tmp_path, sources=sources), alias)
    assert time.monotonic() - started < 10


def test_alias_says_aloud_where_it_came_from(tmp_path, fake, caplog):
    alias = make_alias(tmp_path / "index")
    pip = CopyFrom(tmp_path / "index")
    offline = hub.Sources({"tiny-model": alias}, "http://127.0.0.1:1", download=pip)
    assert hub.resolve("tiny-model", cache=tmp_path, sources=offline).name == "tiny.gguf"
    lines = [record.getMessage() for record in caplog.records]
    assert "does not answer" in lines[0]
    assert lines[1].endswith("Licensed for tests.")
    assert "weights are quantized (Q4_1); hf://org/tiny names the originals" in lines[2]
    assert len(lines) == 3
    # The second run: neither hub nor pip, and still the word about quantized weights.
    caplog.clear()
    online = dataclasses.replace(offline, endpoint=fake.address)
    assert hub.resolve("tiny-model", cache=tmp_path, sources=online).name == "tiny.gguf"
    assert "quantized (Q4_1)" in caplog.text
    assert fake.asked == []
    assert len(pip.calls()) == 1
    # A cache with the hub's own weights prefers them.
    hub.resolve("hf://org/tiny", cache=tmp_path, sources=online)
    assert hub.resolve("tiny-model", cache=tmp_path, sources=offline).is_dir()


def test_alias_from_the_hub(tmp_path, fake, caplog):
    alias = make_alias(tmp_path / "index")
    sources = hub.Sources({"tiny-model": alias}, fake.address, download=CopyFrom(tmp_path))
    folder = hub.resolve("tiny-model", cache=tmp_path, sources=sources)
    assert {path.name for path in folder.iterdir()} == WANTED
    assert "Licensed for tests." in caplog.text
    assert "quantized" not in caplog.text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"pytorch_model.bin": b"", "config.json": b""}, "pytorch_model.bin is a pickle"),
        ({"pytorch_model.bin": b"", "onnx/model.safetensors": b""}, "is a pickle"),
        ({"tiny.Q4_0.gguf": b""}, "tiny.Q4_0.gguf"),
        ({"README.md": b""}, "holds no safetensors"),
        ({"../up.safetensors": b"", "/abs.safetensors": b""}, "holds no safetensors"),
        ({}, "holds no safetensors"),
    ],
)
def test_repositories_without_safetensors(tmp_path, fake, files, words):
    fake.files = files
    sources = hub.Sources(endpoint=fake.address)
    line = refusal(UnsupportedModel, "hf://org/tiny", cache=tmp_path, sources=sources)
    assert words in line
    assert not any(path.startswith("GET /org") for path in fake.asked)


def test_file_that_is_not_as_long_as_promised(tmp_path, fake):
    fake.promised = {"config.json": 3}
    sources = hub.Sources(endpoint=fake.address)
    line = refusal(CorruptFile, "hf://org/tiny", cache=tmp_path, sources=sources)
    assert line == "hf://org/tiny: config.json has 2 bytes, the hub says 3"
    assert snapshot.cached("org/tiny", None, tmp_path) is None


@pytest.mark.parametrize("commit", ["", "../../x", "main", COMMIT + "0"])
def test_hub_that_names_no_commit(tmp_path, fake, commit):
    fake.commit = commit
    sources = hub.Sources(endpoint=fake.address)
    line = refusal(CorruptFile, "hf://org/tiny", cache=tmp_path, sources=sources)
    assert line == f"hf://org/tiny: the hub names no commit ({commit!r})"


def test_damaged_snapshot_is_fetched_again(tmp_path, fake):
    sources = hub.Sources(endpoint=fake.address)
    folder = hub.resolve("hf://org/tiny", cache=tmp_path, sources=sources)
    blob = (folder / "model.safetensors").resolve()
    (record,) = (tmp_path / "snapshots").iterdir()
    for damage in (
        lambda: blob.write_bytes(blob.read_bytes()[:-1]),
        lambda: (folder / "tokenizer.json").unlink(),
        lambda: record.write_text(record.read_text()[:-9]),
        lambda: record.write_text("[]"),
    ):
        damage()
        assert snapshot.cached("org/tiny", None, tmp_path) is None
        assert hub.resolve("hf://org/tiny", cache=tmp_path, sources=sources) == folder
        assert (folder / "model.safetensors").read_bytes() == fake.files["model.safetensors"]
        assert {path.name for path in folder.iterdir()} == WANTED


def _resolve(name: str, cache: Path, address: str) -> None:
    hub.resolve(name, cache=cache, sources=hub.Sources(endpoint=address))


def test_killed_hub_download_is_never_loaded(tmp_path, fake):
    fake.cut, fake.hang = 1 << 19, True
    child = SPAWN.Process(target=_resolve, args=("hf://org/tiny", tmp_path, fake.address))
    child.start()
    deadline = time.monotonic() + 20
    while not any(tmp_path.glob("hub/**/*.incomplete")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    assert child.exitcode == -signal.SIGKILL
    assert any(tmp_path.glob("hub/**/*.incomplete"))  # it was in the middle
    line = refusal(ModelNotFound, "hf://org/tiny", cache=tmp_path, sources=NOWHERE)
    assert "does not answer" in line
    fake.cut = None
    folder = hub.resolve(
        "hf://org/tiny", cache=tmp_path, sources=hub.Sources(endpoint=fake.address)
    )
    assert (folder / "model.safetensors").read_bytes() == fake.files["model.safetensors"]


def test_four_processes_at_once(tmp_path, fake):
    args = ("hf://org/tiny", tmp_path, fake.address)
    children = [SPAWN.Process(target=_resolve, args=args) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    folder = hub.resolve("hf://org/tiny", cache=tmp_path, sources=NOWHERE)
    assert (folder / "model.safetensors").read_bytes() == fake.files["model.safetensors"]


def test_cache_that_cannot_be_written(tmp_path, fake):
    (tmp_path / "file").write_text("")
    sources = hub.Sources(endpoint=fake.address)
    for name in ("hf://org/tiny", "smollm2-135m-instruct"):
        line = refusal(JaxinferError, name, cache=tmp_path / "file", sources=sources)
        assert "JAXINFER_CACHE" in line
    assert fake.asked == []


def test_disk_that_refuses_to_grow(tmp_path, fake):
    """A real failing write: the process may not write more than 512 KiB into one file."""
    alias = make_alias(tmp_path / "index")
    pip = CopyFrom(tmp_path / "index")
    sources = hub.Sources({"tiny-model": alias}, fake.address, download=pip)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        for name in ("hf://org/tiny", "tiny-model"):
            line = refusal(JaxinferError, name, cache=tmp_path, sources=sources)
            assert "File too large" in line
            assert "JAXINFER_CACHE" in line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "index/calls").exists()  # a full disk is no reason to ask elsewhere
    folder = hub.resolve("hf://org/tiny", cache=tmp_path, sources=sources)
    assert (folder / "model.safetensors").read_bytes() == fake.files["model.safetensors"]


def test_real_alias_offline(smollm2_path):
    """With a filled cache, a machine without a network resolves the default model."""
    found = hub.resolve(hub.DEFAULT_MODEL, sources=NOWHERE)
    assert found.is_dir() or str(found) == smollm2_path
