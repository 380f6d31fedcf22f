"""The head of a request: what llhttp and the limits take and refuse."""

import pytest

from wsserver.http import HEAD_SIZE, HEADERS, LINE_SIZE, BadRequest, HeadParser
from wsserver.responses import Request

GET = b"GET /a?b=c HTTP/1.1\r\nHost: localhost\r\nX-One: 1\r\nx-one: 2\r\n\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


def parse(*parts: bytes) -> tuple[Request, bytes]:
    parser = HeadParser()
    for part in parts:
        if (found := parser.feed(part)) is not None:
            assert parser.complete
            return found
    pytest.fail("the head has no end")


def status_of(*parts: bytes) -> int:
    with pytest.raises(BadRequest) as refused:
        parse(*parts)
    return refused.value.response.status


def test_repeated_headers_are_one_list_under_a_name_in_lower_case() -> None:
    request, after = parse(GET)
    assert request == Request("GET", "/a?b=c", {"host": "localhost", "x-one": "1, 2"}, "1.1")
    assert (request.path, after) == ("/a", b"")


@pytest.mark.parametrize("head", [GET, UPGRADE + b"\r\n"])
def test_a_head_is_the_same_however_it_is_split(head: bytes) -> None:
    whole = parse(head)
    for at in range(1, len(head)):
        assert parse(head[:at], head[at:]) == whole
    assert parse(*(bytes([byte]) for byte in head)) == whole


def test_bytes_after_the_head_of_an_upgrade_are_returned() -> None:
    frames = b"\x81\x80\x00\x00\x00\x00" * 3
    assert parse(UPGRADE + b"\r\n" + frames)[1] == frames
    assert parse(UPGRADE, b"\r\n" + frames)[1] == frames


@pytest.mark.parametrize(
    "after", [b"GET /b HTTP/1.0\r\nHost: b\r\nX: y\r\n\r\n", b"\x00\xff" * 50, b"x" * 8000]
)
def test_bytes_after_the_head_of_another_request_change_nothing(after: bytes) -> None:
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
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"BREW / HTTP/1.1\r\n\r\n", 405),
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
def test_a_head_that_is_malformed_or_too_large_is_refused(head: bytes, status: int) -> None:
    assert status_of(head) == status
    assert status_of(*(head[at : at + 5] for at in range(0, len(head), 5))) == status


def test_a_head_without_an_end_is_refused_at_the_limit() -> None:
    line = b"X: " + b"y" * 1000 + b"\r\n"
    parser = HeadParser()
    parser.feed(b"GET / HTTP/1.1\r\n")
    with pytest.raises(BadRequest) as refused:
        for _ in range(HEAD_SIZE // len(line) + 1):
            parser.feed(line)
    assert refused.value.response.status == 431
    assert parser.size <= HEAD_SIZE + len(line)


def test_a_parser_is_freed_without_the_garbage_collector() -> None:
    import gc
    import weakref

    class Watched(HeadParser):
        __slots__ = ("__weakref__",)

    gc.disable()
    try:
        for head in (GET, b"GET / HTTP/1.1\nHost: a\n\n", GET[:20]):
            parser = Watched()
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
def test_a_refusal_repeats_nothing_of_the_request(secret: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(secret)
    assert b"sk-key" not in refused.value.response.body
