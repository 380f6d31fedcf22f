"""An HTTP proxy: it opens tunnels (CONNECT) and passes on requests with a whole URL."""

import asyncio
import base64
import ssl
from typing import Self

from tests.support.raw import Raw

__all__ = ["HttpProxy"]


class HttpProxy:
    """Connects every request to one server on this machine, for any host in the request.

    Args:
        port: where that server listens.
        credentials: ``user:password`` that the proxy demands.
        tls: the TLS context of the proxy.
        refuse: the status that the proxy answers to every request.

    Attributes:
        requests: the first line of each request.
        url: the address of the proxy, without credentials.
    """

    def __init__(
        self,
        port: int,
        credentials: str | None = None,
        tls: ssl.SSLContext | None = None,
        refuse: int | None = None,
    ) -> None:
        self.requests: list[str] = []
        self._port = port
        self._authorization = credentials and "Basic " + base64.b64encode(
            credentials.encode()
        ).decode("ascii")
        self._tls = tls
        self._refuse = refuse
        self._raw = Raw(self._serve, tls)

    async def __aenter__(self) -> Self:
        await self._raw.__aenter__()
        scheme = "http" if self._tls is None else "https"
        self.address = f"127.0.0.1:{self._raw.port}"
        self.url = f"{scheme}://{self.address}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._raw.__aexit__()

    @property
    def accepted(self) -> int:
        """Number of accepted connections."""
        return self._raw.accepted

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.requests.append(first)
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        status = self._refuse
        if self._authorization and headers.get("proxy-authorization") != self._authorization:
            status = 407
        if status is not None:
            writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % status)
            await writer.drain()
            return
        answers, requests = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            if first.startswith("CONNECT "):
                writer.write(b"HTTP/1.1 200 Connection established\r\nvia: x\r\n\r\n")
                prefix = b""
            else:
                prefix = b"http://" + headers["host"].encode("ascii")
                requests.write(head.replace(b" " + prefix, b" ", 1))
            await asyncio.gather(_pass(reader, requests, prefix), _pass(answers, writer))
        finally:
            requests.close()


async def _pass(
    source: asyncio.StreamReader, to: asyncio.StreamWriter, prefix: bytes = b""
) -> None:
    """Pass bytes on, without the origin in the URL of a request."""
    while data := await source.read(65536):
        to.write(data.replace(b" " + prefix, b" ", 1) if prefix else data)
        await to.drain()
    to.close()
