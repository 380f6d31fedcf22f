"""A response of a model's API. A callback gets its body."""

import asyncio
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from wsserver.errors import WsserverError

MAX_UNREAD = 65_536  # bytes of a body that wait for a reader; then the socket is not read
MAX_BUFFER = 1_048_576  # bytes of a decompressed body that wait for a reader
INFLATE_SIZE = 65_536  # bytes that one step of decompression makes at most
MAX_RATIO = 128  # of decompressed to compressed bytes, beyond `MAX_BUFFER`; zeros have 1000

_GZIP = zlib.MAX_WBITS + 16
_ZLIB_HEADER = 2  # bytes


OnData = Callable[[bytes], bool]
"""Called with some bytes of a body. It returns True to stop reading."""
Accept = Callable[["Response"], OnData | None]
"""Called with a response once its headers have arrived. It returns the callback for the body, which
is then called as the socket is read; None if the body is to wait for :meth:`Response.read_body`."""


class Source(Protocol):
    """The connection that a response comes from."""

    def pause_reading(self) -> None:
        """Stop reading until :meth:`resume_reading`."""

    def resume_reading(self) -> None:
        """Continue reading."""

    def drain(self, response: "Response") -> None:
        """Discard the rest of the body."""

    async def close_for(self, response: "Response") -> None:
        """Close the connection, if it still carries the response."""


class HttpError(WsserverError):
    """The exchange with the server failed."""


class NoResponse(HttpError):
    """The connection ended before the response began."""


class MalformedResponse(HttpError):
    """The server sent no HTTP/1.1 response, or too many headers."""


class ClosedEarly(HttpError):
    """The connection ended before the body did."""


class DamagedBody(HttpError):
    """The body cannot be decompressed."""


class Response:
    """A response. A callback gets its body.

    Args:
        source: the connection that the response comes from.
        accept: called with the status and the headers; see :data:`Accept`.
    """

    def __init__(self, source: Source, accept: Accept | None = None) -> None:
        self.status = 0
        # Names in lower case, and values, as they came.
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False  # whether the whole body has arrived
        # Done when the response begins, or failed before that.
        self.head: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._source = source
        self._accept = accept
        self._buffer = bytearray()  # decoded bytes that wait for a reader
        self._on_data: OnData | None = None  # the reader
        # The result of `read_body`; None without a reader.
        self._over: asyncio.Future[bool] | None = None
        self._error: Exception | None = None  # a failure after the response began
        self._decoder: _Decoder | None = None  # None for a body without a content coding

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header. The values of repeated headers are joined by commas."""
        values = [value for key, value in self.headers if key == name]
        return b", ".join(values) if values else None

    async def read_body(self, on_data: OnData) -> bool:
        """Pass the body to a callback: first the bytes that have arrived, then each read at once.

        Args:
            on_data: called with some bytes. It returns True to stop reading. An exception of
                ``on_data`` ends the reading, and is raised here. If ``accept`` returned a
                callback, ``on_data`` is that callback.

        Returns:
            Whether the body has ended; False if ``on_data`` needs no more.

        Raises:
            ClosedEarly: the connection ended before the body did.
            DamagedBody: the body cannot be decompressed.
            MalformedResponse: the framing of the body is malformed.
        """
        if self._over is None and self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            self._source.resume_reading()
            if on_data(data):
                return False
            del data  # otherwise this frame would keep it for as long as the body lasts
        if self._over is None:
            if self._error is not None:
                raise self._error
            if self.complete:
                return True
            self._read(on_data)
        assert self._over is not None
        try:
            return await self._over
        finally:
            self._on_data = self._over = None

    def _read(self, on_data: OnData) -> None:
        self._on_data = on_data
        self._over = asyncio.get_running_loop().create_future()

    def release(self) -> None:
        """Stop reading. The connection serves another request if the body ends soon."""
        self._source.drain(self)

    async def aclose(self) -> None:
        """Close the connection, unless the body has ended or was released.

        The connection is closed when this returns.
        """
        await self._source.close_for(self)

    # For the connection.

    def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Set the status and the headers."""
        self.status, self.headers = status, headers
        coding = (self.header(b"content-encoding") or b"identity").lower()
        if coding != b"identity":
            self._decoder = _Decoder(coding)
        if not self.head.done():
            self.head.set_result(None)
            on_data = None if self._accept is None else self._accept(self)
            if on_data is not None:
                self._read(on_data)

    def receive(self, data: bytes) -> None:
        """Receive a part of the body."""
        if self._decoder is None:
            self._deliver(data)
        elif self._error is None:
            try:
                for part in self._decoder.decode(data):
                    self._deliver(part)
                    if len(self._buffer) > MAX_BUFFER:
                        raise DamagedBody("the body is too large when decompressed")
            except DamagedBody as error:
                self.fail(error)

    def drop_failure(self) -> None:
        """Forget a failure that nobody is going to wait for."""
        for future in (self.head, self._over):
            if future is not None and future.done() and not future.cancelled():
                future.exception()

    def finish(self) -> None:
        """Receive the end of the body."""
        self.complete = True
        if self._decoder is not None and not self._decoder.finished:
            self.fail(DamagedBody("the compressed data is cut"))
        elif self._over is not None and not self._over.done():
            self._over.set_result(True)

    def fail(self, error: Exception) -> None:
        """Fail the exchange."""
        if not self.head.done():
            self.head.set_exception(error)
        elif self._error is None:
            self._error = error
            if self._over is not None and not self._over.done():
                self._over.set_exception(error)

    def _deliver(self, data: bytes) -> None:
        on_data, over = self._on_data, self._over
        if on_data is None or over is None or over.done():
            self._buffer += data
            if len(self._buffer) > MAX_UNREAD:
                self._source.pause_reading()
            return
        try:
            if on_data(data) and not over.done():
                over.set_result(False)
        except Exception as error:  # noqa: BLE001
            if not over.done():  # `on_data` may have cancelled the reader
                over.set_exception(error)


class _Decoder:
    """Decodes the content coding of a body.

    Raises:
        DamagedBody: the coding is unknown.
    """

    def __init__(self, coding: bytes) -> None:
        if coding not in {b"gzip", b"x-gzip", b"deflate"}:
            raise DamagedBody("the body has an unsupported content coding")
        self._started = False
        self._room = MAX_BUFFER  # bytes that may still be made
        self._first = b""
        self._inflate = None if coding == b"deflate" else zlib.decompressobj(_GZIP)

    @property
    def finished(self) -> bool:
        """Whether the compressed data has ended, or never began."""
        return not self._started or (self._inflate is not None and self._inflate.eof)

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Decompress in steps of bounded size.

        Raises:
            DamagedBody: the data is not in the format of the coding, or is larger than real data
                when decompressed. To parse it would hold up the event loop for seconds.
        """
        self._started = True
        self._room += MAX_RATIO * len(data)
        if self._inflate is None:
            # `deflate` is the zlib format (RFC 9110 section 8.4.1.2), but some servers send raw
            # deflate data. The first two bytes show which (RFC 1950 section 2.2).
            self._first = data = self._first + data
            if len(data) < _ZLIB_HEADER:
                return
            zlib_format = data[0] & 0x0F == zlib.DEFLATED and (data[0] << 8 | data[1]) % 31 == 0
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS * (1 if zlib_format else -1))
        try:
            while data and not self._inflate.eof:
                part = self._inflate.decompress(data, INFLATE_SIZE)
                data = self._inflate.unconsumed_tail
                self._room -= len(part)
                if self._room < 0:
                    raise DamagedBody("the body is too large when decompressed")
                if part:
                    yield part
        except zlib.error as error:
            raise DamagedBody("the compressed data is damaged") from error
