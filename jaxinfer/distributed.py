"""One program on many processes, by JAX's own runtime; what is added here is a clear end.

    with distributed.start("10.0.0.1:1234", num_processes=4, process_id=2):
        ...  # the same program in every process

JAX alone notices a killed process by its missing heartbeats and aborts the others with a stack
dump; where one ends by an exception they hang for minutes. So before JAX starts, process 0 calls
the roll at the coordinator's port, and the connections are kept: a wire from every process to
process 0. The system closes the wires of a process however it dies, so a wire that ends before
"bye" was said on it is news of a death, at once, and process 0 passes it on. JAX's heartbeats
remain for what closes no wire: a process that hangs, a host out of reach.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinfer.errors import InvalidArgument, JaxinferError

Tree = TypeVar("Tree")

OTHER_DIED = 3  # exit code of a process that ends because another one was killed
_GO, _BYE = "go", "bye"  # said on a wire by process 0 after the roll call; by all at their end
_GRACE = 1.0  # seconds for news to come, for output to be written, for others to end first


@contextlib.contextmanager
def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 30,
    join_seconds: int = 300,
) -> Iterator[None]:
    """Joins this process to the others for the body of a `with`; all of them leave it together.

    Of coordinator ("host:port" of process 0), num_processes and process_id, JAX finds what is
    None on TPU pods, Slurm and the like. With one process this does nothing. The others may take
    `join_seconds` to come; a process that hangs for `heartbeat_seconds` is given up by JAX.

    Whatever leaves the body but its end (an exception, sys.exit) ends every process, this one
    with the line of a JaxinferError (exit code 2), a traceback (1), or as sys.exit says. The
    others name it on stderr and exit with the same code; where it was killed, with OTHER_DIED.

    Raises InvalidArgument where the arguments are wrong, a process does not come, or JAX has
    looked for its devices already.
    """
    host, port, count, me = _whereabouts(coordinator, num_processes, process_id, join_seconds)
    if heartbeat_seconds < 1 or join_seconds < 1:
        raise InvalidArgument("heartbeat_seconds and join_seconds must be 1 or more")
    if count == 1:
        yield
        return
    with contextlib.suppress(ImportError):  # private; without it JAX refuses too, after the roll
        from jax._src.xla_bridge import backends_are_initialized

        if backends_are_initialized():
            raise InvalidArgument("distributed.start must come before JAX is first used")
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    if me == 0:
        sockets = _call_roll(port, count, join_seconds)
    else:
        sockets = {0: _answer_roll(host, port, f"process {me} of {count}", join_seconds)}
    wires = _Wires(me, count, sockets)
    try:
        jax.distributed.initialize(
            f"{host}:{port}",
            count,
            me,
            initialization_timeout=join_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
        yield
        wires.leave()
    except BaseException as error:
        wires.fail(error)
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is process 0, the one that prints; always true where there is one process."""
    return jax.process_index() == 0


def agree(tree: Tree) -> Tree:
    """The tree of process 0, bit for bit, in every process; every process must call it.

    Leaves are numpy arrays or Python numbers (integers below 2**63), a few; structure, shapes and
    dtypes must be the same in every process. With one process it is the tree itself.
    """
    leaves, form = jax.tree.flatten(tree)
    if jax.process_count() == 1 or not leaves:
        return tree
    arrays = [np.asarray(leaf) for leaf in leaves]
    # As one array of bytes, for without x64 JAX would make 64-bit numbers 32-bit ones.
    said = np.frombuffer(b"".join(array.tobytes() for array in arrays), np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(said))
    parts = np.split(heard, np.cumsum([array.nbytes for array in arrays])[:-1])
    agreed = []
    for leaf, array, part in zip(leaves, arrays, parts, strict=True):
        value = np.frombuffer(part.tobytes(), array.dtype).reshape(array.shape).copy()
        agreed.append(type(leaf)(value) if isinstance(leaf, bool | int | float) else value)
    return jax.tree.unflatten(form, agreed)


class _Wires:
    """The wires of this process, by rank: process 0 has one to every other, those one to it."""

    def __init__(self, me: int, count: int, wires: Mapping[int, socket.socket]) -> None:
        self.me, self.count, self.wires = me, count, wires
        self.byes = threading.Semaphore(0)
        self.ending = threading.Lock()  # taken once, by whoever decides how this process ends
        self.threads = [
            threading.Thread(target=self._listen, args=(rank,), daemon=True) for rank in wires
        ]
        for thread in self.threads:
            thread.start()

    def leave(self) -> None:
        """Says bye, and waits until everybody has."""
        if self.me != 0:
            self._tell(_BYE)
        for _ in self.wires:
            self.byes.acquire()
        self.ending.acquire()
        if self.me == 0:
            self._tell(_BYE)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an error in this one."""
        code, reason = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, JaxinferError):
            code, reason = 2, " ".join(str(error).split())
            text = f"jaxinfer: {reason}"
        elif isinstance(error, SystemExit):
            code, text = (error.code, "") if isinstance(error.code, int) else (1, str(error))
        elif isinstance(error, KeyboardInterrupt):
            code, text = 130, ""
        else:
            text = "".join(traceback.format_exception(error))
            time.sleep(_GRACE)  # a collective breaks when another process dies: _listen knows
        self._end(code, text, f"process {self.me} of {self.count} has failed: {reason}")
        time.sleep(10 * _GRACE)  # _listen was first, and is ending this process
        os._exit(code)

    def _listen(self, rank: int) -> None:
        while (said := _hear(self.wires[rank])) == _BYE:
            self.byes.release()
        died = f"{OTHER_DIED} process {rank} of {self.count} has died"
        code, _, news = (said or died).partition(" ")
        self._end(int(code), f"jaxinfer: {news}; process {self.me} ends with it", news)
        while _hear(self.wires[rank]):  # already ending: process 0 waits for the end of its wires
            pass

    def _tell(self, line: str) -> None:
        for wire in self.wires.values():
            _say(wire, line)

    def _end(self, code: int, text: str, news: str) -> None:
        if not self.ending.acquire(blocking=False):
            return
        with contextlib.suppress(OSError):
            os.write(2, f"{text.strip()}\n".encode(errors="replace") if text else b"")
        self._tell(f"{code or OTHER_DIED} {news}")
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(_GRACE)  # not for ever: its reader may have stopped reading
        if self.me == 0:  # JAX aborts the others as soon as process 0 is gone: let them end first
            until = time.monotonic() + 3 * _GRACE
            for thread in set(self.threads) - {threading.current_thread()}:
                thread.join(max(0.0, until - time.monotonic()))
        os._exit(code)  # not sys.exit: the main thread may sit in a collective for ever


def _whereabouts(
    coordinator: str | None, count: int | None, me: int | None, seconds: int
) -> tuple[str, int, int, int]:
    """(host, port, number of processes, number of this one), checked."""
    if None in (coordinator, count, me):
        # Private: JAX has no public way to ask where the others are without starting at once.
        with contextlib.suppress(ImportError, AttributeError, TypeError):
            from jax._src.clusters import ClusterEnv

            coordinator, count, me, _ = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, count, me, None, None, seconds
            )
    if coordinator is None or count is None or me is None:
        raise InvalidArgument(
            "JAX knows of no cluster here: give coordinator (host:port of process 0), "
            "num_processes and process_id"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument(f"coordinator {coordinator!r} must be host:port of process 0")
    if not 0 <= me < count:
        raise InvalidArgument(f"process_id {me} must be 0 or more and below num_processes {count}")
    return host, int(port), count, me


def _call_roll(port: int, count: int, seconds: int) -> dict[int, socket.socket]:
    """Process 0's wires to all the others, once they have all come."""
    until = time.monotonic() + seconds
    wires: dict[int, socket.socket] = {}
    awaited = {f"process {rank} of {count}": rank for rank in range(1, count)}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise InvalidArgument(f"port {port}: {error.strerror}; choose another") from None
    with server:  # and closed, for JAX's own service to have the port
        while awaited:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                wire, _ = server.accept()
            except TimeoutError:
                problem = f"{', '.join(awaited)} did not come within {seconds} s"
                for wire in wires.values():
                    _say(wire, problem)
                raise InvalidArgument(problem) from None
            wire.settimeout(5)
            name = _hear(wire)
            if name in awaited:
                wires[awaited.pop(name)] = wire
            else:  # one too many, of another number of processes, or a stranger
                _say(wire, f"process 0 awaits {', '.join(awaited)}, not {name}")
                wire.close()
    for wire in wires.values():
        _keep(wire)
        _say(wire, _GO)
    return wires


def _answer_roll(host: str, port: int, name: str, seconds: int) -> socket.socket:
    """The wire from the process of this name to process 0, once all have come."""
    until = time.monotonic() + seconds
    while True:
        try:
            wire = socket.create_connection((host.strip("[]"), port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise InvalidArgument(
                    f"no answer from process 0 at {host}:{port} within {seconds} s "
                    f"({error.strerror or error}): is it running, and is this its address?"
                ) from None
            time.sleep(0.1)
    _say(wire, name)
    wire.settimeout(seconds + 5)
    answer = _hear(wire)
    if answer != _GO:
        raise InvalidArgument(f"no roll call at {host}:{port}: {answer[:200] or 'no answer'}")
    _keep(wire)
    return wire


def _keep(wire: socket.socket) -> None:
    """Lets a wire live for hours without a word; firewalls forget one that is silent."""
    wire.settimeout(None)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def _say(wire: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):
        wire.sendall(" ".join(line.split()).encode(errors="replace")[:1000] + b"\n")


def _hear(wire: socket.socket) -> str:
    """The next line on a wire, and no byte of what may follow it; "" at its end."""
    line = b""
    with contextlib.suppress(OSError):
        while len(line) < 1000 and (seen := wire.recv(1000, socket.MSG_PEEK)):
            line += wire.recv(seen.find(b"\n") + 1 or len(seen))
            if line.endswith(b"\n"):
                return line.decode(errors="replace").strip()
    return ""
