"""Ports for programs that bind their port themselves, some time after a test has chosen it."""

import random
import socket

__all__ = ["free_port"]

# Below the ports that the kernel gives to sockets without a port, so that no client takes them.
RANGE = range(20_000, 32_000)


def free_port() -> int:
    """Return a port of 127.0.0.1 that no program uses now."""
    while True:
        port = random.choice(RANGE)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
