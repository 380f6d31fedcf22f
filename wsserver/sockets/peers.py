"""The user whose program has the other end of a TCP connection, by sock_diag(7)."""

import errno
import os
import socket
import struct
from typing import Any

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

Address = tuple[Any, ...]  # a host, a port, and more for IPv6


def own_users() -> frozenset[int] | None:
    """Return the ids of the users that a server without tokens serves.

    These are the user of the process, root, the user who called sudo, and :data:`ELSEWHERE`.

    Returns:
        The ids; None where the kernel does not tell the user of a connection.
    """
    if user_at(("127.0.0.1", 1), ("127.0.0.1", 1)) is None:
        return None
    sudo = os.environ.get("SUDO_UID", "")
    return frozenset({0, os.getuid(), int(sudo) if sudo.isdecimal() else 0, ELSEWHERE})


def user_at(peer: Address, here: Address) -> int | None:
    """Return the user whose program has the other end of a TCP connection within this machine.

    Args:
        peer: address of the other end.
        here: address of this end.

    Returns:
        The id of the user; :data:`NOBODY` if the program at the other end has closed it;
        :data:`ELSEWHERE` if this kernel does not have the other end; None if the kernel
        does not tell. Linux alone does (sock_diag(7)).
    """
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    ends = (socket.inet_pton(family, end[0].partition("%")[0]) for end in (peer, here))
    connection = struct.pack("!HH16s16s", peer[1], here[1], *ends) + struct.pack("=III", 0, *ANY)
    query = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 1 << ESTABLISHED) + connection
    header = struct.pack("=IHHII", HEADER + len(query), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(0)  # the kernel answers within `send`
            kernel.send(header + query)
            answer = kernel.recv(4096)
    except (AttributeError, OSError):
        return None
    kind = struct.unpack_from("=IH", answer)[1]
    if kind == SOCK_DIAG_BY_FAMILY:
        user, inode = struct.unpack_from("=II", answer, OWNER)
        return int(user) if inode else NOBODY  # without an inode the kernel returns 0, root
    (error,) = struct.unpack_from("=i", answer, HEADER)
    return ELSEWHERE if error == -errno.ENOENT else None


def established(sock: socket.socket) -> bool:
    """Whether neither end of a TCP connection has begun to close it (tcp(7))."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED
    except OSError:
        return False
