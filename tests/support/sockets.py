"""The open WebSockets of a server in the same process."""

from typing import cast

from wsserver import Server
from wsserver.sockets.websocket import Socket


def sockets_of(server: Server) -> list[Socket]:
    """Return the WebSockets that are open, the oldest first."""
    assert all(isinstance(transport, Socket) for transport in server.app.connections)
    return cast("list[Socket]", list(server.app.connections))
