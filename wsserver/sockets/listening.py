"""Listening sockets: how they are bound, named and accepted from."""

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from wsserver.descriptors import AT_ONCE
from wsserver.errors import ConfigError
from wsserver.logs import log

BACKLOG = 100  # connections that wait to be accepted; asyncio's own default
PAUSE = 0.1  # seconds until another attempt to accept connections, where there is no room
NO_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
IP = (socket.AF_INET, socket.AF_INET6)
StreamSocket = socket.socket


class Listening(Protocol):
    """A socket that has an address."""

    @property
    def family(self) -> int:
        """The kind of address."""

    def getsockname(self) -> Any:
        """Return the address."""


class UnixSocket:
    """A listening unix socket.

    It replaces the socket of a dead server, and no other file.

    Args:
        path: path of the socket.
        mode: permissions of the socket: who may connect.

    Raises:
        ConfigError: the path has another file or a living server, or the socket cannot be made.
    """

    def __init__(self, path: str, mode: int) -> None:
        self.path = Path(path)
        # The socket; it listens already.
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _locked(self.path.parent):
                _remove_stale(self.path)
                self.sock.bind(path)
                self._made = self.path.lstat()
                self.path.chmod(mode)
                self.sock.listen(BACKLOG)  # nobody can connect before
        except (OSError, ValueError) as error:
            self._give_up()
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise ConfigError(f"unix_socket: cannot listen on {path}: {reason}") from None
        except ConfigError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self.sock.close()
        self.remove()

    def remove(self) -> None:
        """Remove the file, unless another server has put its own there."""
        with contextlib.suppress(OSError, AttributeError):  # the file is gone, or was never made
            if os.path.samestat(self.path.lstat(), self._made):
                self.path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    """Lock a folder, so that two servers that start at once do not remove each other's socket."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # the folder may be written but not listed
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"unix_socket: another program has locked {folder}; it may be a server that starts"
            ) from None
        yield
    finally:
        os.close(lock)


def _remove_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConfigError(f"unix_socket: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)  # a server whose queue is full lives too
        result = probe.connect_ex(str(path))
    if result == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif result != errno.ENOENT:
        raise ConfigError(f"unix_socket: {path} is in use by a running server")


async def bound(host: str, port: int) -> list[socket.socket]:
    """Return sockets that are bound to all addresses of a host, and do not listen yet.

    Raises:
        OSError: the host has no address, or an address is in use.
    """
    loop = asyncio.get_running_loop()
    kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
    found = dict.fromkeys(await loop.getaddrinfo(host, port, type=kind, flags=flags))
    sockets: list[socket.socket] = []
    try:
        for family, _, protocol, _, address in found:
            try:
                sock = socket.socket(family, kind, protocol)
                sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
            except OSError as error:
                # `localhost` may have an IPv6 address on a machine without IPv6.
                if error.errno not in NO_ADDRESS or len(sockets) == 1 == len(found):
                    raise
                sockets.pop().close()
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise OSError(error.errno, f"{error.strerror}: {host} port {port}") from error
    return sockets


class Acceptor:
    """Accepts the connections of a listening socket, in the same way on every event loop.

    New connections wait in the kernel while the process has no descriptors or memory left, or all
    the connections that it may have. The servers of the event loops do not wait: asyncio tries and
    logs a hundred times in a row, and uvloop closes each new connection.

    Args:
        sock: a bound socket; the acceptor closes it.
        make: makes the protocol of a connection.
        full: whether the server has all the connections that it may have.
    """

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], asyncio.BaseProtocol],
        full: Callable[[], bool],
    ) -> None:
        self.sock = sock
        self._make = make
        self._full = full
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen and accept connections."""
        self.sock.setblocking(False)  # noqa: FBT003
        self.sock.listen(BACKLOG)
        self._go_on()

    def close(self) -> None:
        """Accept no more connections. Idempotent."""
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock)
            self.sock.close()
        if self._pause is not None:
            self._pause.cancel()

    def _go_on(self) -> None:
        self._loop.add_reader(self.sock, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if self._full():
                return self._wait()
            try:
                connection, _ = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return None
            except OSError as error:
                log.warning("cannot accept connections", reason=error.strerror)
                return self._wait()
            opening = self._loop.create_task(self._open(connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)
        return None

    def _wait(self) -> None:
        self._loop.remove_reader(self.sock)
        self._pause = self._loop.call_later(PAUSE, self._go_on)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except OSError:  # the peer has closed the connection
            connection.close()


def loopback(sockets: Iterable[Listening]) -> bool:
    """Whether all sockets have loopback addresses, which programs of this machine alone can reach.

    A unix socket does not count as loopback: a proxy may forward to it. Without sockets the result
    is False.
    """
    addresses = [sock.getsockname()[0] if sock.family in IP else "" for sock in sockets]
    return bool(addresses) and all(map(_is_loopback, addresses))


def _is_loopback(address: str) -> bool:
    # `is_loopback` of a mapped address differs between versions of Python.
    parsed = ipaddress.ip_address(address.partition("%")[0]) if address else None
    return parsed is not None and parsed in (
        ipaddress.ip_network("127.0.0.0/8" if parsed.version == 4 else "::1/128")  # noqa: PLR2004
    )


def tcp_address(sockets: Iterable[Listening]) -> tuple[str, int]:
    """Return host and port of the first TCP socket; ``""`` and 0 where there is none."""
    names = (sock.getsockname() for sock in sockets if sock.family in IP)
    host, port = next(names, ("", 0))[:2]
    return host, port


def name_of(sock: Listening) -> str:
    """Return the address of a socket as people write it: ``[::1]:3001``, a path, or ``@name``."""
    name = sock.getsockname()
    if isinstance(name, bytes):
        return "@" + name[1:].decode(errors="replace")
    if isinstance(name, str):
        return name
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
