"""Many processes on this machine, over loopback: what they agree on, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer import distributed
from jaxinfer.errors import InvalidArgument

HEARTBEAT = 10  # seconds
SOON = 5.0  # seconds: less than a heartbeat, for a wire that closes is noticed at once

PRELUDE = """
import signal, sys, time
import numpy as np
import jax
from jaxinfer import distributed
from jaxinfer.errors import ModelNotFound

jax.config.update("jax_num_cpu_devices", DEVICES)

def say(*words):
    print(">", *words, flush=True)

def summer():
    spec = jax.sharding.PartitionSpec("x")
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.make_array_from_callback(
        (jax.device_count(),),
        jax.sharding.NamedSharding(mesh, spec),
        lambda at: np.full(1, jax.process_index() + 1, np.float32),
    )
    add = lambda row: jax.lax.psum(row, "x")
    everyone = jax.sharding.PartitionSpec()
    total = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=spec, out_specs=everyone))
    return lambda: float(total(rows)[0])

def ready(me):
    total = summer()
    total()
    say("READY")
    return total
"""

IN_COLLECTIVES = """
with distributed.start(WHERE, COUNT, ME, heartbeat_seconds=HEARTBEAT):
    total = ready(ME)
    while True:
        total()
"""

IN_PYTHON = """
with distributed.start(WHERE, COUNT, ME, heartbeat_seconds=HEARTBEAT):
    ready(ME)
    while True:
        sum(range(1000))
"""

ONE_FAILS = """
with distributed.start(WHERE, COUNT, ME, heartbeat_seconds=HEARTBEAT):
    total = ready(ME)
    if ME == FAILING:
        time.sleep(0.5)
        FAILURE
    sys.setswitchinterval(0.1)  # the news of process 0 must not need quick threads
    while True:
        total() if ME == 0 else sum(range(1000))
"""

AGREE = """
with distributed.start(WHERE, COUNT, ME, heartbeat_seconds=HEARTBEAT):
    say("sum", summer()())
    mine = {"seed": 2**40 + ME, "ids": np.arange(3) + 2**40 * ME, "stop": ME == 0, "t": 0.1 + ME}
    heard = distributed.agree(mine)
    say("agreed", heard["seed"], heard["ids"].tolist(), heard["stop"], heard["t"])
    say("types", *(type(value).__name__ for value in heard.values()), heard["ids"].dtype)
    if distributed.is_first():
        time.sleep(1)  # the others wait: a process may have more to do than they
        say("first")
time.sleep(0.5 * ME)  # and from here on everyone is alone
say("alone")
"""


class Party:
    """The processes of one program, their output in files; ended, every one, by `end`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, body: str, count: int, **words: int) -> None:
        """One process a rank of `count`; words are the names that the program finds set."""
        where = f"127.0.0.1:{free_port()}"
        for rank in range(count):
            self.add(body, {}, WHERE=where, COUNT=count, ME=rank, **words)

    def add(self, body: str, environment: dict[str, str], **words: int | str) -> None:
        """One process more."""
        known = {"HEARTBEAT": HEARTBEAT, "DEVICES": 1, **words}
        names = "\n".join(f"{name} = {value!r}" for name, value in known.items())
        clean = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
        rank = len(self.processes)
        with open(self._file(rank, "out"), "wb") as out, open(self._file(rank, "err"), "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-c", names + PRELUDE + body],
                env={**clean, **environment, "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self.processes.append(process)

    def _file(self, rank: int, kind: str) -> Path:
        return self.folder / f"{rank}.{kind}"

    def out(self, rank: int) -> list[str]:
        """What a process said; gloo prints to the same descriptor, each thread as it likes."""
        lines = self._file(rank, "out").read_text().splitlines()
        return [line[2:] for line in lines if line.startswith("> ")]

    def err(self, rank: int) -> str:
        return self._file(rank, "err").read_text()

    def wait_ready(self) -> None:
        until = time.monotonic() + 60
        ranks = range(len(self.processes))
        while not all("READY" in self.out(rank) for rank in ranks):
            assert time.monotonic() < until, [self.err(rank) for rank in ranks]
            assert all(process.poll() is None for process in self.processes), self.err(0)
            time.sleep(0.05)
        time.sleep(0.3)  # into the loop

    def codes(self, seconds: float = 60) -> list[int]:
        """Exit codes, all of them within these seconds."""
        until = time.monotonic() + seconds
        return [process.wait(max(0.01, until - time.monotonic())) for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def party(tmp_path: Path) -> Iterator[Party]:
    party = Party(tmp_path)
    try:
        yield party
    finally:
        party.end()


def free_port(lowest: int = 0) -> int:
    for port in range(lowest, lowest + 1000) if lowest else [0]:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("no free port")


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_processes_agree_and_end_together_in_silence(
    party: Party, count: int, devices: int
) -> None:
    party.start(AGREE, count, DEVICES=devices)
    assert party.codes() == [0] * count
    total = float(devices * sum(range(1, count + 1)))
    for rank in range(count):
        assert party.out(rank) == [
            f"sum {total}",
            f"agreed {2**40} [0, 1, 2] True 0.1",
            "types ndarray int bool float int64",
            *(["first"] if rank == 0 else []),
            "alone",
        ]
        assert party.err(rank) == ""


@pytest.mark.parametrize(
    ("count", "dying", "by", "body"),
    [
        (2, 0, signal.SIGKILL, IN_COLLECTIVES),
        (2, 1, signal.SIGTERM, IN_COLLECTIVES),
        (4, 0, signal.SIGKILL, IN_COLLECTIVES),
        (4, 3, signal.SIGKILL, IN_COLLECTIVES),
        (2, 1, signal.SIGKILL, IN_PYTHON),
    ],
    ids=["first of 2", "last of 2", "first of 4", "last of 4", "in Python"],
)
def test_a_killed_process_ends_the_others(
    party: Party, count: int, dying: int, by: signal.Signals, body: str
) -> None:
    party.start(body, count)
    party.wait_ready()
    party.processes[dying].send_signal(by)
    expected = [distributed.OTHER_DIED] * count
    expected[dying] = -by
    assert party.codes(SOON) == expected
    for rank in set(range(count)) - {dying}:
        line = f"jaxinfer: process {dying} of {count} has died; process {rank} ends with it\n"
        # JAX itself has a word to say when its coordinator, process 0, is gone.
        assert line in party.err(rank) if dying == 0 else line == party.err(rank)


@pytest.mark.parametrize(
    ("failing", "failure", "code", "reason", "own"),
    [
        (1, "raise ValueError('boom')", 1, "ValueError: boom", "ValueError: boom\n"),
        (0, "raise ModelNotFound('no x')", 2, "no x", "jaxinfer: no x\n"),
        (1, "sys.exit(2)", 2, "SystemExit: 2", ""),
    ],
    ids=["exception", "JaxinferError", "exit"],
)
def test_a_process_that_fails_ends_the_others(
    party: Party, failing: int, failure: str, code: int, reason: str, own: str
) -> None:
    party.start(ONE_FAILS.replace("FAILURE", failure), 2, FAILING=failing)
    assert party.codes(40) == [code, code]  # JAX alone would wait for 300 s
    assert party.err(failing).endswith(own)
    assert ("Traceback" in party.err(failing)) == ("ValueError" in failure)
    other = 1 - failing
    news = f"jaxinfer: process {failing} of 2 has failed: {reason}; process {other} ends with it\n"
    assert party.err(other) == news


def test_a_process_that_hangs_is_given_up_by_jax(party: Party) -> None:
    party.start(IN_COLLECTIVES, 2, HEARTBEAT=3)
    party.wait_ready()
    party.processes[1].send_signal(signal.SIGSTOP)
    assert party.processes[0].wait(3 + 10) != 0
    assert "Task 1 heartbeat timeout" in party.err(0) or "heartbeats):\n1" in party.err(0)


def test_the_roll_call_says_who_is_missing(party: Party) -> None:
    body = """
try:
    with distributed.start(WHERE, COUNT, ME, join_seconds=WAIT):
        pass
except distributed.InvalidArgument as error:
    say(error)
"""
    here, nobody = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    party.add(body, {}, WHERE=here, COUNT=3, ME=0, WAIT=4)
    party.add(body, {}, WHERE=here, COUNT=3, ME=1, WAIT=4)
    party.add(body, {}, WHERE=here, COUNT=2, ME=1, WAIT=4)
    party.add(body, {}, WHERE=nobody, COUNT=2, ME=1, WAIT=1)
    assert party.codes() == [0] * 4
    assert party.out(0) == ["process 2 of 3 did not come within 4 s"]
    assert party.out(1) == [f"no roll call at {here}: process 2 of 3 did not come within 4 s"]
    assert party.out(2)[0].startswith(f"no roll call at {here}: process 0 awaits process")
    assert party.out(3)[0].startswith(f"no answer from process 0 at {nobody} within 1 s (")


def test_jax_finds_the_others_under_slurm(party: Party) -> None:
    port = free_port(61440)  # JAX takes this port and the job's number, modulo 4096
    for rank in range(2):
        party.add(
            "with distributed.start(): say(summer()())",
            environment={
                "SLURM_JOB_ID": str(port - 61440),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            },
        )
    assert party.codes() == [0, 0]
    assert [party.out(rank) for rank in range(2)] == [["3.0"], ["3.0"]]


@pytest.mark.parametrize(
    ("where", "count", "me", "says"),
    [
        ("127.0.0.1", 2, 0, "must be host:port"),
        (":1234", 2, 0, "must be host:port"),
        ("127.0.0.1:99999", 2, 0, "must be host:port"),
        ("127.0.0.1:port", 2, 0, "must be host:port"),
        ("127.0.0.1:1234", 2, 2, "process_id 2 must be 0 or more and below num_processes 2"),
        ("127.0.0.1:1234", 2, -1, "process_id -1"),
        ("127.0.0.1:1234", 0, 0, "num_processes 0"),
        ("127.0.0.1:1234", 2, None, "give coordinator"),
        (None, None, None, "give coordinator"),
    ],
)
def test_bad_arguments(where: str | None, count: int | None, me: int | None, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says), distributed.start(where, count, me):
        pass


def test_bad_times() -> None:
    for words in ({"heartbeat_seconds": 0}, {"join_seconds": 0}):
        start = distributed.start("127.0.0.1:1234", 2, 0, **words)
        with pytest.raises(InvalidArgument, match="1 or more"), start:
            pass


def test_too_late() -> None:
    jax.devices()
    start = distributed.start("127.0.0.1:1234", 2, 1, join_seconds=1)
    with pytest.raises(InvalidArgument, match="before JAX is first used"), start:
        pass


def test_one_process_is_alone() -> None:
    ids = np.arange(3)
    tree = {"ids": ids, "n": 1}
    with distributed.start("127.0.0.1:1234", 1, 0):
        assert distributed.is_first()
        assert distributed.agree(tree) is tree
    with pytest.raises(ValueError, match="own"), distributed.start("127.0.0.1:1234", 1, 0):
        raise ValueError("own")
