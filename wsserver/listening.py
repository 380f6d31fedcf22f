"""Where and how the server listens: certificates, unix sockets, and what a service manager does.

It makes and describes sockets; what is said over them is not its business.
"""

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import socket
import ssl
import stat
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol

from wsserver.descriptors import AT_ONCE
from wsserver.errors import ConfigError
from wsserver.logs import log

__all__ = [
    "Acceptor",
    "Certificate",
    "Listening",
    "StreamSocket",
    "UnixSocket",
    "bound",
    "established",
    "inherited",
    "loopback",
    "name_of",
    "notify",
    "own_users",
    "tcp_address",
    "user_at",
]

FIRST_INHERITED = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
NOTIFY_TIMEOUT = 1.0  # seconds for a service manager to take what it is told
BACKLOG = 100  # connections that wait to be accepted; asyncio's own default
PAUSE = 0.1  # seconds until another attempt to accept connections, where there is no room
NO_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
# What OpenSSL calls a key of another certificate, by whether it is of the same kind.
MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
IP = (socket.AF_INET, socket.AF_INET6)
NOBODY = -1  # the user of a connection that no program holds
ELSEWHERE = -2  # the user of a connection from another kernel, as from Windows to WSL

# Of linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h and netinet/tcp.h.
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
HEADER = 16  # bytes of a struct nlmsghdr
OWNER = 80  # where a struct inet_diag_msg after that has idiag_uid and idiag_inode
ANY = (0xFFFFFFFF, 0xFFFFFFFF)  # INET_DIAG_NOCOOKIE
ESTABLISHED = 1  # the state of a connection

StreamSocket = socket.socket
Address = tuple[Any, ...]  # a host, a port, and of IPv6 more


class Listening(Protocol):
    """A socket as far as its address is looked at."""

    @property
    def family(self) -> int:
        """The kind of address."""

    def getsockname(self) -> Any:
        """Return the address."""


class Certificate:
    """A certificate and its key, which can be replaced under a running server.

    Args:
        cert: a PEM file with the certificate, and those between it and its root.
        key: a PEM file with the key; empty where ``cert`` has it too.

    Attributes:
        context: what a server takes; it stays the same over all reloads.

    Raises:
        ConfigError: a file cannot be read, or the two do not fit.
    """

    context: ssl.SSLContext

    def __init__(self, cert: str, key: str = "") -> None:
        self._cert, self._key = cert, key or cert
        self.context = self._current = self._load()
        # A context keeps one certificate per kind of key, so that one loaded later need not take
        # the place of the first. Hence a new context each time, chosen as a connection begins;
        # this is called for clients that name no server too.
        self.context.sni_callback = self._choose

    def reload(self) -> bool:
        """Read the files again, for connections from now on; if that fails, keep what there is.

        Returns:
            Whether it worked. If not, the log has a line that says why.
        """
        try:
            self._current = self._load()
        except ConfigError as error:
            log.error("the certificate stays as it was", reason=str(error))
            return False
        return True

    def _choose(self, tls: ssl.SSLObject | ssl.SSLSocket, *_: object) -> None:
        tls.context = self._current

    def _load(self) -> ssl.SSLContext:
        # Looked at first, as the library's own errors do not say which file they are about.
        if b"-----BEGIN CERTIFICATE-----" not in _read("cert", self._cert):
            raise ConfigError(f"cert: {self._cert} has no certificate in PEM")
        if not re.search(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----", _read("key", self._key)):
            raise ConfigError(f"key: {self._key} has no private key in PEM")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=self._encrypted)
        except ssl.SSLError as error:
            if error.reason in MISMATCHES:
                raise ConfigError(
                    f"key: {self._key} does not belong to the certificate in {self._cert}"
                ) from None
            reason = (error.reason or "not understood").replace("_", " ").lower()
            raise ConfigError(f"cert: cannot use {self._cert} with {self._key}: {reason}") from None
        except OSError as error:  # changed since it was looked at
            raise ConfigError(f"cert: cannot read {self._cert}: {error.strerror}") from None
        return context

    def _encrypted(self) -> NoReturn:
        # Called for the password; without it the library would ask the terminal, and wait.
        raise ConfigError(f"key: {self._key} is encrypted; it has to be without a password")


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{setting}: cannot read {path}: {reason}") from None


class UnixSocket:
    """A listening socket in the file system.

    It takes the place of a socket that a dead server left there, and of nothing else.

    Args:
        path: where.
        mode: who may connect: the permissions of the file.

    Attributes:
        sock: it listens already.

    Raises:
        ConfigError: there is something else, a living server, or no way to make it.
    """

    def __init__(self, path: str, mode: int) -> None:
        self.path = Path(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _locked(self.path.parent):
                _remove_stale(self.path)
                self.sock.bind(path)
                self._made = self.path.lstat()
                self.path.chmod(mode)
                self.sock.listen(BACKLOG)  # before this nobody can connect, whatever the mode was
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
        with contextlib.suppress(OSError, AttributeError):  # gone already, or never made
            if os.path.samestat(self.path.lstat(), self._made):
                self.path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    """Keep a server that starts at the same moment from taking this one's file for a stale one."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it may be written but not listed
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
        raise ConfigError(f"unix_socket: {path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)  # one with a full queue lives too
        result = probe.connect_ex(str(path))
    if result == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif result != errno.ENOENT:
        raise ConfigError(f"unix_socket: {path} is in use by a running server")


async def bound(host: str, port: int) -> list[socket.socket]:
    """Return sockets bound to all addresses of a host; they do not listen yet.

    Raises:
        OSError: there is no such host, or an address is taken.
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
                # A machine without IPv6 has a name for its loopback all the same.
                if error.errno not in NO_ADDRESS or len(sockets) == 1 == len(found):
                    raise
                sockets.pop().close()
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class Acceptor:
    """Accepts the connections of a listening socket, on all event loops alike.

    While the process has no descriptors or memory left, or as many connections as it may, all
    others wait in the kernel. The event loops' own servers do not: asyncio tries and logs a hundred
    times in a row, and again for each of these a second later; uvloop hangs up on whoever comes.

    Args:
        sock: a socket that is bound; the acceptor closes it.
        make: makes the protocol of a connection.
        full: whether there are as many connections as there may be.
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
        """Listen, and accept connections from now on."""
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
        except OSError:  # the peer has gone
            connection.close()


def inherited() -> list[socket.socket]:
    """Take the sockets that a service manager has opened for this process (sd_listen_fds(3)).

    Children do not inherit them, and asking twice finds none.

    Raises:
        ConfigError: what it handed over is not what a server listens on.
    """
    process = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit()):
        raise ConfigError(f"LISTEN_FDS: {count!r} is no number")
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
            f"LISTEN_FDS: descriptor {descriptor} is no listening stream socket; "
            "a unit needs ListenStream= and Accept=no"
        )
    return sock


def notify(*lines: str) -> None:
    """Tell the service manager, if there is one, how things stand (sd_notify(3)).

    Args:
        lines: such as ``READY=1``; ``RELOADING=1`` gets the time that it needs beside it.
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
        log.warning("cannot tell the service manager", what=lines[0], reason=error.strerror)


def loopback(sockets: Iterable[Listening]) -> bool:
    """Whether only this machine's own programs can reach the sockets, by their addresses.

    Not so for unix sockets: a proxy may stand before one. Nor for none at all.
    """
    addresses = [sock.getsockname()[0] if sock.family in IP else "" for sock in sockets]
    return bool(addresses) and all(map(_is_loopback, addresses))


def _is_loopback(address: str) -> bool:
    # Not what is_loopback says of mapped addresses, which differs between versions of Python.
    parsed = ipaddress.ip_address(address.partition("%")[0]) if address else None
    return parsed is not None and parsed in (
        ipaddress.ip_network("127.0.0.0/8" if parsed.version == 4 else "::1/128")  # noqa: PLR2004
    )


def own_users() -> frozenset[int] | None:
    """Return the ids of the users that this process serves as itself; None if it cannot know.

    They are its own user, root, whoever started it through sudo, and :data:`ELSEWHERE`. It cannot
    know other users' connections where the kernel does not tell whose they are.
    """
    if user_at(("127.0.0.1", 1), ("127.0.0.1", 1)) is None:
        return None
    sudo = os.environ.get("SUDO_UID", "")
    return frozenset({0, os.getuid(), int(sudo) if sudo.isdecimal() else 0, ELSEWHERE})


def user_at(peer: Address, here: Address) -> int | None:
    """Return whose program is at the other end of a TCP connection within this machine.

    Args:
        peer: the address of the other end.
        here: the address of this end.

    Returns:
        The id of the user, :data:`NOBODY` where no program holds that end any more, or
        :data:`ELSEWHERE` where that end is not in this kernel, or is no more. None where the kernel
        does not tell, as none but Linux does (sock_diag(7)).
    """
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    ends = (socket.inet_pton(family, end[0].partition("%")[0]) for end in (peer, here))
    connection = struct.pack("!HH16s16s", peer[1], here[1], *ends) + struct.pack("=III", 0, *ANY)
    query = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 1 << ESTABLISHED) + connection
    header = struct.pack("=IHHII", HEADER + len(query), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(0)  # the kernel has answered when it has taken the query
            kernel.send(header + query)
            answer = kernel.recv(4096)
    except (AttributeError, OSError):
        return None
    kind = struct.unpack_from("=IH", answer)[1]
    if kind == SOCK_DIAG_BY_FAMILY:
        user, inode = struct.unpack_from("=II", answer, OWNER)
        return int(user) if inode else NOBODY  # without an inode the kernel says that it is root's
    (error,) = struct.unpack_from("=i", answer, HEADER)
    return ELSEWHERE if error == -errno.ENOENT else None


def established(sock: socket.socket) -> bool:
    """Whether neither end of a TCP connection has begun to close it (tcp(7))."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED
    except OSError:
        return False


def tcp_address(sockets: Iterable[Listening]) -> tuple[str, int]:
    """Return host and port of the first that has them; ``""`` and 0 where none has."""
    names = (sock.getsockname() for sock in sockets if sock.family in IP)
    host, port = next(names, ("", 0))[:2]
    return host, port


def name_of(sock: Listening) -> str:
    """Return its address as people write it: ``[::1]:3001``, a path, or ``@`` and a name."""
    name = sock.getsockname()
    if isinstance(name, bytes):
        return "@" + name[1:].decode(errors="replace")
    if isinstance(name, str):
        return name
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
