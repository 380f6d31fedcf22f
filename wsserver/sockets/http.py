"""One HTTP/1.1 request of a client, parsed by llhttp (RFC 9112)."""

import re
from http import HTTPStatus

from httptools import (
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
)

from wsserver.responses import BadRequest, Request

HEAD_SIZE = 32_768  # bytes of a request's head, as nginx and others have it
LINE_SIZE = 8192  # bytes of the target, and of one header
HEADERS = 128  # of one request
LIST_ITEMS = 64  # of a header that is a list, over all its lines
LISTS = (  # headers whose items are parsed one by one
    "connection",
    "upgrade",
    "sec-websocket-extensions",
    "sec-websocket-protocol",
    "x-forwarded-for",
    "if-none-match",
)
VERSIONS = ("1.0", "1.1")
FRAMING_SIZE = 32_768  # bytes of chunk sizes, chunk extensions and trailers, besides
FRAMING_PER_BYTE = 8  # for each byte of the body: chunks of one byte have five
ABSOLUTE = re.compile(r"https?://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)


class RequestParser:
    """Parses one request, in as many parts as it comes in."""

    def __init__(self) -> None:
        # Bytes of the head so far. Bytes of the body that came with its end do not count.
        self.size = 0
        self.head: Request | None = None  # the request, once its head is complete
        self.early = b""  # the bytes after the head of an upgrade
        self.body = bytearray()  # bytes of the body so far, without the framing of chunks
        # The Content-Length; None for a body in chunks, or where the head has neither.
        self.length: int | None = None
        self.ended = False  # whether the whole request is parsed
        self.more = False  # whether bytes came after the request
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._longest = 0  # bytes of a header
        self._method = self._version = ""
        self._websocket = False
        self._upgrade = False
        self._head_ended = False  # the head is complete
        self._received = 0  # bytes after the read with the end of the head
        self._parser: HttpRequestParser | None = HttpRequestParser(self)

    @property
    def lines(self) -> int:
        """Lines of the head so far."""
        return 1 + len(self._headers)

    def close(self) -> None:
        """Release llhttp's parser, which refers to this parser."""
        self._parser = None

    def feed(self, data: bytes) -> None:
        """Parse more of the request.

        Raises:
            BadRequest: the request is malformed, its head is too large, or it is of another version
                of HTTP.
        """
        if self.ended and self._upgrade:
            self.early += data
        elif self.ended:
            self.more = True
        elif self.head is None:
            self._feed_head(data)
        else:
            self._feed_body(data)
        if self.ended:
            self.close()

    def _feed_head(self, data: bytes) -> None:
        after = len(data)
        # An exception would be part of a reference cycle.
        refusal: tuple[HTTPStatus, str] | None = None
        try:
            self._parse(data)
        except HttpParserUpgrade as upgrade:
            (after,) = upgrade.args
        except HttpParserError as error:
            if isinstance(error, HttpParserInvalidMethodError) and data[:1].isalpha():
                refusal = HTTPStatus.NOT_IMPLEMENTED, "Unknown HTTP method."
            else:
                refusal = HTTPStatus.BAD_REQUEST, f"Malformed HTTP request: {error}."
        self.size += after - len(self.body)
        self._check_size()
        if self._head_ended:
            self.head = self._request()
            self.early = data[after:]
            if self._upgrade and not self._websocket:
                self._ignore_upgrade()
        # A malformed body is refused. Malformed bytes after the whole request are ignored.
        if refusal is not None and not self.ended:
            raise BadRequest(*refusal)

    def _ignore_upgrade(self) -> None:
        """Parse the body as of a request without an upgrade (RFC 9110 section 7.8).

        Some HTTP clients ask for HTTP/2 so. llhttp stops at the head of such a request.
        """
        self._upgrade = self.ended = False
        rest, self.early = self.early, b""
        assert self.head is not None
        chunked = "transfer-encoding" in self.head.headers
        framing = b"transfer-encoding: chunked" if chunked else b"content-length: "
        size = b"" if chunked else b"%d" % (self.length or 0)
        self._parser = HttpRequestParser(self)
        self._parse(b"POST / HTTP/1.1\r\n%b%b\r\n\r\n" % (framing, size))
        if self.ended:
            self.more = bool(rest)
        elif rest:
            self._feed_body(rest)

    def _feed_body(self, data: bytes) -> None:
        self._received += len(data)
        try:
            self._parse(data)
        except HttpParserUpgrade:
            self.ended = True
        except HttpParserError as error:
            if not self.ended:
                message = f"Malformed body of the request: {error}."
                raise BadRequest(HTTPStatus.BAD_REQUEST, message) from error
        framing = self._received - len(self.body)
        if framing > FRAMING_SIZE + FRAMING_PER_BYTE * len(self.body):
            message = "The body of the request has more framing than content."
            raise BadRequest(HTTPStatus.BAD_REQUEST, message)

    def _parse(self, data: bytes) -> None:
        assert self._parser is not None, "the request was refused"
        self._parser.feed_data(data)

    def _check_size(self) -> None:
        if len(self._target) > LINE_SIZE:
            message = f"The target has more than {LINE_SIZE} bytes."
            raise BadRequest(HTTPStatus.REQUEST_URI_TOO_LONG, message)
        too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        # llhttp reports the end of a head for upgrades only: other reads may have more bytes.
        if self.size > HEAD_SIZE and (self._upgrade or not self._head_ended):
            message = f"The head of the request has more than {HEAD_SIZE} bytes."
            raise BadRequest(too_large, message)
        if len(self._headers) > HEADERS:
            raise BadRequest(too_large, f"The request has more than {HEADERS} headers.")
        if self._longest > LINE_SIZE:
            raise BadRequest(too_large, f"A header has more than {LINE_SIZE} bytes.")

    def _request(self) -> Request:
        if self._version not in VERSIONS:
            message = "This server speaks HTTP/1.1."
            raise BadRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, message)
        headers: dict[str, str] = {}
        for given, bytes_ in self._headers:
            name, value = given.decode("latin-1").lower(), bytes_.decode("latin-1").rstrip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        for name in LISTS:
            value = headers.get(name, "")
            # One comma fewer than items.
            if value.count(",") + value.count(";") >= LIST_ITEMS:
                message = f"The header {name} has more than {LIST_ITEMS} items."
                raise BadRequest(HTTPStatus.BAD_REQUEST, message)
        self._check_framing(headers)
        target = self._target.decode()
        # The host of a target in absolute form counts, not the header (RFC 9112 section 3.2.2).
        if (absolute := ABSOLUTE.fullmatch(target)) is not None:
            headers["host"], path = absolute.groups()
            target = path if path.startswith("/") else f"/{path}"
        return Request(self._method, target, headers, self._version)

    def _check_framing(self, headers: dict[str, str]) -> None:
        coding = headers.get("transfer-encoding")
        if coding is not None and self._version == "1.0":
            message = "HTTP/1.0 has no Transfer-Encoding."
            raise BadRequest(HTTPStatus.BAD_REQUEST, message)
        if coding is not None and coding.lower() != "chunked":
            message = "This server knows no Transfer-Encoding but chunked."
            raise BadRequest(HTTPStatus.NOT_IMPLEMENTED, message)
        self.length = int(headers["content-length"]) if "content-length" in headers else None
        self._websocket = "websocket" in headers.get("upgrade", "").lower()
        if self._upgrade and self._websocket and (coding is not None or self.length):
            raise BadRequest(HTTPStatus.BAD_REQUEST, "A WebSocket handshake has no body.")
        if headers.get("expect", "100-continue").lower() != "100-continue":
            message = "This server knows no expectation but 100-continue."
            raise BadRequest(HTTPStatus.EXPECTATION_FAILED, message)

    # Called by llhttp.

    def on_url(self, url: bytes) -> None:
        """Add a part of the target."""
        if not self._head_ended:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header."""
        if not self._head_ended:
            self._headers.append((name, value))
            self._longest = max(self._longest, len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Mark the head as complete."""
        if not self._head_ended and self._parser is not None:
            self._method = self._parser.get_method().decode()
            self._version = self._parser.get_http_version()
            self._upgrade = self._parser.should_upgrade()
            self._head_ended = True

    def on_body(self, data: bytes) -> None:
        """Add a part of the body."""
        if not self.ended:
            self.body += data

    def on_message_complete(self) -> None:
        """Mark the request as complete."""
        self.ended = True

    def on_message_begin(self) -> None:
        """Mark that another request begins."""
        self.more = self.ended
