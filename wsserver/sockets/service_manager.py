"""Gets sockets from a service manager, and sends states to it, with the protocols of systemd."""

import os
import socket
import time

from wsserver.errors import ConfigError
from wsserver.logs import log

FIRST_INHERITED = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
NOTIFY_TIMEOUT = 1.0  # seconds for the service manager to receive a message


def inherited() -> list[socket.socket]:
    """Return the sockets that the service manager opened for this process (sd_listen_fds(3)).

    Child processes do not inherit the sockets. A second call returns none.

    Raises:
        ConfigError: a descriptor is not a listening stream socket.
    """
    process = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit()):
        raise ConfigError(f"LISTEN_FDS: {count!r} is not a number")
    return [_adopt(FIRST_INHERITED + number) for number in range(int(count))]


def _adopt(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)  # noqa: FBT003
        sock = socket.socket(fileno=descriptor)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"LISTEN_FDS: descriptor {descriptor}: {error.strerror}") from None
    if not listens or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ConfigError(
            f"LISTEN_FDS: descriptor {descriptor} is not a listening stream socket; "
            "a unit needs ListenStream= and Accept=no"
        )
    return sock


def notify(*lines: str) -> None:
    """Send the state of the process to the service manager, if there is one (sd_notify(3)).

    Args:
        lines: for example ``READY=1``. To ``RELOADING=1`` this adds ``MONOTONIC_USEC``.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if "RELOADING=1" in lines:
        lines = (*lines, f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_TIMEOUT)
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.sendall("\n".join(lines).encode())
    except OSError as error:
        log.warning("service manager not notified", what=lines[0], reason=error.strerror)
