"""The head of one HTTP/1.1 request, parsed by llhttp (RFC 9112)."""

from http import HTTPStatus

from httptools import (
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
)

from wsserver.responses import Request, Response, method_not_allowed, respond

__all__ = ["HEAD_SIZE", "BadRequest", "HeadParser"]

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


class BadRequest(Exception):
    """The head cannot be answered as asked; ``response`` says why."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class HeadParser:
    """Parses the head of one request, in as many parts as it comes in.

    Attributes:
        size: bytes of the head so far.
        lines: lines of the head so far.
    """

    __slots__ = (
        "_done",
        "_headers",
        "_longest",
        "_method",
        "_parser",
        "_target",
        "_upgrade",
        "_version",
        "lines",
        "size",
    )

    def __init__(self) -> None:
        self.size = self.lines = 0
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._longest = 0  # bytes of a header
        self._method = self._version = ""
        self._upgrade = False
        self._done = False
        self._parser: HttpRequestParser | None = HttpRequestParser(self)

    @property
    def complete(self) -> bool:
        """Whether the head is complete."""
        return self._done

    def close(self) -> None:
        """Let go of llhttp's parser, which holds on to this one."""
        self._parser = None

    def feed(self, data: bytes) -> tuple[Request, bytes] | None:
        """Parse more of the head.

        Returns:
            The request and the bytes after its head, once the head is complete. Where the request
            is no upgrade, nothing after its head is returned.

        Raises:
            BadRequest: the head is malformed, too large, or of another version of HTTP.
        """
        assert self._parser is not None, "the head is complete, or was refused"
        after = len(data)
        refusal: Response | None = None
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            (after,) = upgrade.args
        except HttpParserError as error:
            if isinstance(error, HttpParserInvalidMethodError) and data[:1].isalpha():
                refusal = method_not_allowed()
            else:
                refusal = respond(HTTPStatus.BAD_REQUEST, f"Malformed HTTP request: {error}.")
        head = data[:after]
        self.size += len(head)
        self.lines += head.count(b"\n")
        self._check_size()
        # After a complete head, llhttp has gone on to what it takes for a body or the next request.
        if self._done:
            self.close()
            return self._request(), data[after:]
        if refusal is not None:
            raise BadRequest(refusal)
        return None

    def _check_size(self) -> None:
        if len(self._target) > LINE_SIZE:
            raise _refused(
                HTTPStatus.REQUEST_URI_TOO_LONG, f"The target has more than {LINE_SIZE} bytes."
            )
        too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        # llhttp tells where a head ends for upgrades alone: another's last read may have more.
        if self.size > HEAD_SIZE and (self._upgrade or not self._done):
            raise _refused(too_large, f"The head of the request has more than {HEAD_SIZE} bytes.")
        if len(self._headers) > HEADERS:
            raise _refused(too_large, f"The request has more than {HEADERS} headers.")
        if self._longest > LINE_SIZE:
            raise _refused(too_large, f"A header has more than {LINE_SIZE} bytes.")

    def _request(self) -> Request:
        if self._version not in VERSIONS:
            raise _refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "This server speaks HTTP/1.1.")
        headers: dict[str, str] = {}
        for given, bytes_ in self._headers:
            name, value = given.decode("latin-1").lower(), bytes_.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        for name in LISTS:
            value = headers.get(name, "")
            # One comma fewer than items.
            if value.count(",") + value.count(";") >= LIST_ITEMS:
                message = f"The header {name} has more than {LIST_ITEMS} items."
                raise _refused(HTTPStatus.BAD_REQUEST, message)
        body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        if self._upgrade and body:
            raise _refused(HTTPStatus.BAD_REQUEST, "A WebSocket handshake has no body.")
        return Request(self._method, self._target.decode(), headers, self._version)

    # Called by llhttp.

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        if not self._done:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        if not self._done:
            self._headers.append((name, value))
            self._longest = max(self._longest, len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Note that the head is complete."""
        if not self._done and self._parser is not None:
            self._method = self._parser.get_method().decode()
            self._version = self._parser.get_http_version()
            self._upgrade = self._parser.should_upgrade()
            self._done = True


def _refused(status: HTTPStatus, message: str) -> BadRequest:
    return BadRequest(respond(status, message))
