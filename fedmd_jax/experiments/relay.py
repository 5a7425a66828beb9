"""A door to another machine that stays open when the machine is gone."""

import contextlib
import socket
import threading
import time

_SECONDS = 20.0  # after which the other machine is taken for one that never listens


def relay(host: str, port: int) -> int:
    """Lets this process reach a port of another machine through one of its own, which never closes first.

    JAX's client aborts its process, with a stack of C++, when the connection to the process of the coordinator closes:
    before anybody can say what has happened. So it is not told.

    Args:
      host: of the other machine.
      port: there.

    Returns:
      A port on the loopback address.
    """
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(server, host, port), daemon=True, name="relay").start()
    return server.getsockname()[1]


def _serve(server: socket.socket, host: str, port: int) -> None:
    kept = []
    while True:
        here, _ = server.accept()
        kept.append(here)
        threading.Thread(target=_carry, args=(here, host, port, kept), daemon=True).start()


def _carry(here: socket.socket, host: str, port: int, kept: list[socket.socket]) -> None:
    there = _reach(host, port)
    if there is not None:
        kept.append(there)
        threading.Thread(target=_pump, args=(here, there), daemon=True).start()
        _pump(there, here)


def _reach(host: str, port: int) -> socket.socket | None:
    """A connection, also where the other machine is not listening yet: who is let in here does not knock twice soon."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        try:
            there = socket.create_connection((host, port), timeout=_SECONDS)
        except OSError:
            time.sleep(0.05)
        else:
            there.settimeout(None)
            return there
    return None


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(2**16):
            target.sendall(content)
