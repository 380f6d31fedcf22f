"""Parsing of one request: accepted and refused heads and bodies."""

import pytest

from wsserver.responses import BadRequest, Request
from wsserver.sockets.http import FRAMING_SIZE, HEAD_SIZE, HEADERS, LINE_SIZE, RequestParser

GET = b"GET /a?b=c HTTP/1.1\r\nHost: localhost\r\nX-One: 1\r\nx-one: 2\r\n\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


def parse(*parts: bytes) -> tuple[Request, bytes]:
    parser = RequestParser()
    for part in parts:
        parser.feed(part)
        if parser.head is not None:
            return parser.head, parser.early
    pytest.fail("the head has no end")


def status_of(*parts: bytes) -> int:
    with pytest.raises(BadRequest) as refused:
        parse(*parts)
    return refused.value.response.status


def test_repeated_headers_are_joined_under_lowercase_name() -> None:
    request, after = parse(GET)
    assert request == Request("GET", "/a?b=c", {"host": "localhost", "x-one": "1, 2"}, "1.1")
    assert (request.path, after) == ("/a", b"")


def test_whitespace_around_header_value_is_no_part_of_it() -> None:
    sent = b"POST / HTTP/1.1\r\nHost:\t a \t\r\nTransfer-Encoding: chunked \r\n\r\n"
    assert parse(sent)[0].headers == {"host": "a", "transfer-encoding": "chunked"}


@pytest.mark.parametrize("head", [GET, UPGRADE + b"\r\n"])
def test_head_split_at_any_byte_is_parsed_equally(head: bytes) -> None:
    whole = parse(head)
    for at in range(1, len(head)):
        assert parse(head[:at], head[at:]) == whole
    assert parse(*(bytes([byte]) for byte in head)) == whole


def test_bytes_after_upgrade_head_are_returned() -> None:
    frames = b"\x81\x80\x00\x00\x00\x00" * 3
    assert parse(UPGRADE + b"\r\n" + frames)[1] == frames
    assert parse(UPGRADE, b"\r\n" + frames)[1] == frames


@pytest.mark.parametrize(
    "after", [b"GET /b HTTP/1.0\r\nHost: b\r\nX: y\r\n\r\n", b"\x00\xff" * 50, b"x" * 8000]
)
def test_bytes_after_other_head_do_not_change_request(after: bytes) -> None:
    request, rest = parse(GET + after)
    assert (request.method, request.target, request.version) == ("GET", "/a?b=c", "1.1")
    assert request.headers == {"host": "localhost", "x-one": "1, 2"}
    assert rest == b""


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX\x00: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\rb\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/x.y\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nExpect: tea\r\n\r\n", 417),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        (UPGRADE + b"Content-Length: 3\r\n\r\nabc", 400),
        (UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /" + b"x" * LINE_SIZE + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * LINE_SIZE + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (HEADERS + 1) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX-Forwarded-For: " + b"a," * 64 + b"b\r\n\r\n", 400),
    ],
)
def test_malformed_or_too_large_head_is_refused(head: bytes, status: int) -> None:
    assert status_of(head) == status
    assert status_of(*(head[at : at + 5] for at in range(0, len(head), 5))) == status


def test_endless_head_is_refused_at_limit() -> None:
    line = b"X: " + b"y" * 1000 + b"\r\n"
    parser = RequestParser()
    parser.feed(b"GET / HTTP/1.1\r\n")
    with pytest.raises(BadRequest) as refused:
        for _ in range(HEAD_SIZE // len(line) + 1):
            parser.feed(line)
    assert refused.value.response.status == 431
    assert parser.size <= HEAD_SIZE + len(line)


def test_parser_is_freed_without_garbage_collector() -> None:
    import gc
    import weakref

    gc.disable()
    try:
        for head in (GET, b"GET / HTTP/1.1\nHost: a\n\n", GET[:20]):
            parser = RequestParser()
            ended = weakref.ref(parser)
            try:
                parser.feed(head)
            except BadRequest:
                pass
            finally:
                parser.close()
            del parser
            assert ended() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("secret", [b"GET / HTTP/1.1\r\nsk-key\x00: a\r\n\r\n"])
def test_refusal_quotes_no_part_of_request(secret: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(secret)
    assert b"sk-key" not in refused.value.response.body


# Targets.


@pytest.mark.parametrize(
    ("target", "host", "path"),
    [
        ("/a?b=c", "localhost", "/a?b=c"),
        ("http://example.org/a?b=c", "example.org", "/a?b=c"),
        ("HTTPS://example.org:8443", "example.org:8443", "/"),
        ("http://example.org?b=c", "example.org", "/?b=c"),
        ("http://example.org/a#b", "example.org", "/a"),
        ("http:///a", "", "/a"),
        ("*", "localhost", "*"),
    ],
)
def test_host_of_absolute_target_replaces_host_header(target: str, host: str, path: str) -> None:
    method = "OPTIONS" if target == "*" else "GET"
    request, _ = parse(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert (request.headers["host"], request.target) == (host, path)


# Bodies.

POST = b"POST /a HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = POST + b"Content-Length: 11\r\n\r\nhello world"
CHUNKS = CHUNKED + b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nTrailer: x\r\n\r\n"


def read(*parts: bytes) -> RequestParser:
    parser = RequestParser()
    for part in parts:
        parser.feed(part)
    return parser


@pytest.mark.parametrize("whole", [WHOLE, CHUNKS], ids=["length", "chunks"])
def test_body_split_at_any_byte_is_parsed_equally(whole: bytes) -> None:
    for at in range(1, len(whole)):
        parser = read(whole[:at], whole[at:])
        assert (bytes(parser.body), parser.ended, parser.more) == (b"hello world", True, False)
        assert parser.head is not None
        assert "trailer" not in parser.head.headers
    assert read(*(bytes([byte]) for byte in whole)).body == b"hello world"


@pytest.mark.parametrize("whole", [WHOLE, CHUNKS, GET], ids=["length", "chunks", "none"])
@pytest.mark.parametrize("after", [WHOLE, GET, UPGRADE + b"\r\n", b"\x00garbage"])
def test_following_request_does_not_change_first(whole: bytes, after: bytes) -> None:
    expected = read(whole)
    for parser in (read(whole + after), read(whole, after), read(whole[:-1], whole[-1:] + after)):
        assert parser.ended
        assert parser.more
        assert (parser.head, parser.body) == (expected.head, expected.body)


@pytest.mark.parametrize(
    "body",
    [b"x\r\n", b"5\r\nhello world\r\n", b"-1\r\n", b"fffffffffffffffff\r\n", b"1\nx\n"],
)
def test_malformed_chunks_are_refused(body: bytes) -> None:
    for parts in ((CHUNKED + body,), (CHUNKED, body), (CHUNKED, *(bytes([b]) for b in body))):
        with pytest.raises(BadRequest) as refused:
            read(*parts)
        assert refused.value.response.status == 400


@pytest.mark.parametrize(
    "parts",
    [
        [b"1;" + b"x" * 8000 + b"\r\na\r\n"] * 10,
        [b"1;" + b"x" * 8000] + [b"x" * 8000] * 10,
        [b"0\r\n"] + [b"Trailer: " + b"x" * 4000 + b"\r\n"] * 20,
    ],
    ids=["extensions", "one extension", "trailers"],
)
def test_framing_of_chunks_is_bounded(parts: list[bytes]) -> None:
    parser = read(CHUNKED)
    fed = 0
    with pytest.raises(BadRequest) as refused:
        for part in parts:
            fed += len(part)
            parser.feed(part)
    assert refused.value.response.status == 400
    assert fed < 2 * FRAMING_SIZE


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize(
    ("whole", "body"),
    [
        (POST + H2C + b"Content-Length: 5\r\n\r\nhello", b"hello"),
        (POST + H2C + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (POST + H2C + b"\r\n", b""),
    ],
    ids=["length", "chunks", "no body"],
)
def test_upgrade_to_http_2_is_ignored(whole: bytes, body: bytes) -> None:
    for at in range(1, len(whole)):
        parser = read(whole[:at], whole[at:])
        assert (bytes(parser.body), parser.ended, parser.more) == (body, True, False)
        assert parser.early == b""
    parser = read(whole + GET)
    assert (bytes(parser.body), parser.ended, parser.more) == (body, True, True)


def test_chunks_of_one_byte_are_accepted() -> None:
    parser = read(CHUNKED, *[b"1\r\nx\r\n"] * 20_000, b"0\r\n\r\n")
    assert parser.ended
    assert len(parser.body) == 20_000
