"""The processes of one run, each connected with the first: what that one has decided, and the end of any of them.

A plain connection closes at once where a process dies. JAX itself would wait for minutes, or end the others with the
stack of its C++.
"""

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_FRAME = struct.Struct(">cQ")  # kind and length of what follows
_VALUE, _NEWS, _SIGNAL, _DONE = b"V", b"N", b"S", b"D"
_PATIENCE = 2.0  # seconds to hear of others, and for others to hear
_MAX_HELLO = 4096  # bytes: anybody may knock


class TeamError(ValueError):
    """Processes that do not find each other, or do not go together; the message is one line."""


class News(NamedTuple):
    """The end of one process, which is that of all."""

    process: int
    what: str  # "was interrupted"; what has failed, with its reason
    code: int  # with which the others end

    @property
    def expected(self) -> bool:
        """Whether the process has told it itself."""
        return self.what != _LOST


_LOST = "has ended without a word"
LOST_CODE = 3


class Team:
    """All processes of a run, as one of them sees them; everything is told by process 0, and to it.

    Methods that all processes must call together, in the same order: `tell`, `collect`, `part`.

    Attributes:
      process_id: of this one.
      num_processes: of all.
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        process_id: int,
        num_processes: int,
        *,
        on_news: Callable[[News], Any],
        on_signal: Callable[[int], Any],
    ):
        """Begins to listen.

        Args:
          connections: as `meet` gives them.
          process_id: of this process.
          num_processes: of all.
          on_news: called, in another thread, with the first end of another process; should end this one.
          on_signal: called, in another thread of process 0, with a signal that another process was sent.
        """
        self.process_id, self.num_processes = process_id, num_processes
        self._connections = dict(connections)
        self._on_news, self._on_signal = on_news, on_signal
        self._values = {peer: queue.SimpleQueue() for peer in connections}
        self._sending = {peer: threading.Lock() for peer in connections}
        self._gone = {peer: threading.Event() for peer in connections}  # said that it is done, or closed
        self._done: set[int] = set()
        self._leaving, self._first = threading.Event(), threading.Lock()
        for peer in connections:
            threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"process {peer}").start()

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which alone writes."""
        return self.process_id == 0

    def tell(self, find: Callable[[], bytes]) -> bytes:
        """What process 0 finds, in all processes; the others do not look."""
        if not self.is_first:
            return self._values[0].get()
        found = find()
        for peer in self._connections:
            self._send(peer, _VALUE, found)
        return found

    def collect(self, value: Any) -> list[Any]:
        """What each process has, which JSON knows, by process, in all processes; nobody goes on before all are here."""
        own = json.dumps(value).encode()
        if not self.is_first:
            self._send(0, _VALUE, own)
        others = [self._values[peer].get() for peer in sorted(self._connections)] if self.is_first else []
        return json.loads(self.tell(lambda: b"[" + b",".join([own, *others]) + b"]"))

    def signal(self, number: int) -> None:
        """Lets process 0 know of a signal; to be called where a signal is handled, in the middle of anything."""
        threading.Thread(target=self._send, args=(0, _SIGNAL, str(number).encode()), daemon=True).start()

    def leave(self, what: str, code: int) -> None:
        """The end of this process before its time; returns when the others know, who end then."""
        self._leaving.set()
        news = json.dumps([self.process_id, what, code]).encode()
        for peer in self._connections:
            with contextlib.suppress(OSError):
                self._write(peer, _NEWS, news)
        self._wait_for_all(_PATIENCE)

    def part(self) -> None:
        """The end of all, when all are done; until process 0 is, its end before its time is that of the others, too."""
        if self.is_first:
            self._wait_for_all()
            self._leaving.set()
        for peer in self._connections:
            with contextlib.suppress(OSError):
                self._write(peer, _DONE, b"")
        if not self.is_first:
            self._wait_for_all()
            self._leaving.set()

    def _wait_for_all(self, seconds: float | None = None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        for gone in self._gone.values():
            gone.wait(None if end is None else max(0.0, end - time.monotonic()))

    def _send(self, peer: int, kind: bytes, content: bytes) -> None:
        try:
            self._write(peer, kind, content)
        except OSError:
            time.sleep(_PATIENCE)  # `_listen` says why, and ends this process
            raise

    def _write(self, peer: int, kind: bytes, content: bytes) -> None:
        with self._sending[peer]:
            self._connections[peer].sendall(_FRAME.pack(kind, len(content)) + content)

    def _listen(self, peer: int) -> None:
        with contextlib.suppress(OSError):
            while frame := _receive(self._connections[peer]):
                kind, content = frame
                if kind == _VALUE:
                    self._values[peer].put(content)
                elif kind == _SIGNAL:
                    self._on_signal(int(content))
                else:
                    self._done.add(peer)
                    if kind == _NEWS:
                        self._hear(News(*json.loads(content)))
                    self._gone[peer].set()
        if peer not in self._done:
            self._hear(News(peer, _LOST, LOST_CODE))
        self._gone[peer].set()

    def _hear(self, news: News) -> None:
        """Passes it on, and lets this process end by itself where it was about to, for the same reason perhaps."""
        if self._leaving.is_set() or not self._first.acquire(blocking=False):
            return
        for peer in self._connections if self.is_first else ():
            if peer != news.process:
                with contextlib.suppress(OSError):
                    self._write(peer, _NEWS, json.dumps(news).encode())
        if news.expected and self._leaving.wait(_PATIENCE / 2):
            return
        self._on_news(news)


def meet(
    address: str, process_id: int, num_processes: int, *, seconds: float, known: Any = None
) -> dict[int, socket.socket]:
    """Waits until all processes are here.

    Args:
      address: HOST:PORT of process 0, which listens there.
      process_id: of this process.
      num_processes: of all.
      seconds: how long to wait.
      known: what must be the same in all processes, for JSON.

    Returns:
      In process 0 a connection with every other, in the others one with process 0.

    Raises:
      TeamError: somebody has not come in time, or does not belong here.
    """
    end, hello = time.monotonic() + seconds, {"process": process_id, "of": num_processes, "known": known}
    host, port = split_address(address)
    if process_id > 0:
        return {0: _knock(host, port, hello, end, seconds)}
    with contextlib.ExitStack() as unless_all_come:
        found: dict[int, socket.socket] = {}
        unless_all_come.callback(lambda: [connection.close() for connection in found.values()])
        with _server(host, port) as server:
            while len(found) < num_processes - 1:
                server.settimeout(max(0.01, end - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = ", ".join(str(i) for i in range(1, num_processes) if i not in found)
                    raise TeamError(
                        f"{seconds:g} s are over, and of {num_processes} processes these have not come to {address}: "
                        f"{missing}"
                    ) from None
                _welcome(connection, found, hello)
        for connection in found.values():
            with contextlib.suppress(OSError):  # has died; `Team` will find out
                connection.sendall(_FRAME.pack(_VALUE, 0))
            _settle(connection)
        unless_all_come.pop_all()
    return found


def split_address(address: str) -> tuple[str, int]:
    """Host and port; a `TeamError` where it is not HOST:PORT.

    >>> split_address("[::1]:1234")
    ('::1', 1234)
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise TeamError(f"the coordinator must be HOST:PORT, with a port from 1 to 65535, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine can come there."""
    return host in ("localhost", "::1") or host.startswith("127.")


def free_port(host: str) -> int:
    """One on which nobody listens at the moment."""
    with _server(host, 0) as server:
        return server.getsockname()[1]


def _server(host: str, port: int) -> socket.socket:
    """On all addresses of the machine, but for one that nobody else can reach."""
    try:
        if is_loopback(host):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise TeamError(f"process 0 cannot listen on port {port} of {host}: {error.strerror or error}") from error


def _welcome(connection: socket.socket, found: dict[int, socket.socket], own: dict[str, Any]) -> None:
    """Keeps the connection if it is from one of the processes that are missing."""
    connection.settimeout(_PATIENCE)
    try:
        _, content = _receive(connection, _MAX_HELLO) or (b"", b"null")
        hello = json.loads(content)
        process_id = hello["process"]
        known = {key: (hello[key], own[key]) for key in ("of", "known")}
        is_one = type(process_id) is type(hello["of"]) is int and 0 < process_id < hello["of"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not one of ours
        is_one = False
    if not is_one:
        connection.close()
        return
    problem = None
    if known["of"][0] != known["of"][1]:
        problem = f"process {process_id} is one of {known['of'][0]}, but process 0 one of {known['of'][1]}"
    elif known["known"][0] != known["known"][1]:
        problem = f"process {process_id} has {known['known'][0]}, but process 0 has {known['known'][1]}"
    elif process_id in found and not _is_closed(found[process_id]):
        problem = f"there is a process {process_id} already"
    if problem is None:
        if process_id in found:
            found[process_id].close()
        found[process_id] = connection
        return
    with contextlib.suppress(OSError):
        connection.sendall(_FRAME.pack(_NEWS, len(problem.encode())) + problem.encode())
    connection.close()
    if process_id not in found:
        raise TeamError(problem)


def _is_closed(connection: socket.socket) -> bool:
    """Whether the process at the other end has died; it has nothing to say before all are here."""
    connection.setblocking(False)  # with a timeout Python waits before it looks
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_PATIENCE)


def _knock(host: str, port: int, hello: dict[str, Any], end: float, seconds: float) -> socket.socket:
    """A connection with process 0, when all are there."""
    while True:
        left = end - time.monotonic()
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, left))
            break
        except OSError as error:
            if left <= 0:
                raise TeamError(
                    f"{seconds:g} s are over, and there is no process 0 at {host}:{port}: {error.strerror or error}"
                ) from error
            time.sleep(min(0.2, max(0.0, left)))
    content = json.dumps(hello).encode()
    try:
        connection.sendall(_FRAME.pack(_VALUE, len(content)) + content)
        connection.settimeout(max(0.1, end - time.monotonic()) + 2 * _PATIENCE)  # process 0 knows better who is missing
        answer = _receive(connection, _MAX_HELLO)
    except OSError:
        answer = None
    if answer is None or answer[0] == _NEWS:
        connection.close()
        lost = f"process 0 at {host}:{port} has ended before all processes had come"
        raise TeamError(lost if answer is None else answer[1].decode())
    _settle(connection)
    return connection


def _settle(connection: socket.socket) -> None:
    """For a long time: a machine that says nothing for twenty seconds is dead."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _receive(connection: socket.socket, most: int | None = None) -> tuple[bytes, bytes] | None:
    """Kind and content of the next message; None where there is none any more."""
    header = _read(connection, _FRAME.size)
    if header is None:
        return None
    kind, length = _FRAME.unpack(header)
    if most is not None and length > most:
        raise ValueError(f"a message of {length} bytes")
    content = _read(connection, length)
    return None if content is None else (kind, content)


def _read(connection: socket.socket, length: int) -> bytes | None:
    content = bytearray(length)
    view = memoryview(content)
    while view:
        if not (received := connection.recv_into(view)):
            return None
        view = view[received:]
    return bytes(content)
