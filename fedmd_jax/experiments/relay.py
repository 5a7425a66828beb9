"""A door to another machine that stays open when the machine is gone."""

import contextlib
import socket
import threading


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
        try:
            there = socket.create_connection((host, port))
        except OSError:
            continue
        threading.Thread(target=_pump, args=(here, there), daemon=True).start()
        threading.Thread(target=_pump, args=(there, here), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(2**16):
            target.sendall(content)
