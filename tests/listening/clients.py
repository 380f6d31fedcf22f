"""Clients of TLS and unix sockets, and the command that starts a server."""

import contextlib
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from websockets.asyncio.client import unix_connect

from tests.support.client import Client

ROOT = Path(__file__).parents[2]
KINDS = {"rsa": "rsa:2048", "ec": "ec -pkeyopt ec_paramgen_curve:prime256v1"}
SERVE = ("-m", "wsserver", "serve", "--demo-rate", "0")


@contextlib.asynccontextmanager
async def on_unix(path: Path | str) -> AsyncIterator[Client]:
    async with unix_connect(str(path), "ws://localhost/") as socket_:
        yield Client(socket_)


def put(made: Path, kind: str, folder: Path) -> dict[str, Any]:
    """Copy a certificate into a folder; return the settings for it."""
    for suffix in ("pem", "key"):
        shutil.copy(made / f"{kind}.{suffix}", folder / f"site.{suffix}")
    return {"cert": str(folder / "site.pem"), "key": str(folder / "site.key")}


def trusting(made: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for kind in KINDS:
        context.load_verify_locations(made / f"{kind}.pem")
    return context


def shown(chat: Client) -> str:
    """Return the kind of the certificate that the server has sent to this client."""
    certificate = chat.socket.transport.get_extra_info("peercert")
    return str(certificate["subject"][0][0][1])
