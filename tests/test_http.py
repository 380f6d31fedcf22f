"""Responses to HTTP requests and to WebSocket handshakes."""

import asyncio
import gzip
import re
import subprocess
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

import wsserver
from tests.support.puppet import BOUND, Puppet
from tests.support.tools import require_libraries, require_npm_package
from wsserver.page import without_comments


async def ask(
    server: wsserver.Server, request: str, port: int | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send a request of the given lines; return status, headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port or server.port)
    try:
        writer.write(request.replace("\n", "\r\n").encode())
        async with asyncio.timeout(BOUND):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


async def test_page_has_content_security_policy_for_own_files(
    server: wsserver.Server,
) -> None:
    status, headers, body = await ask(server, "GET / HTTP/1.1\nHost: localhost\n\n")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert int(headers["content-length"]) == len(body)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert not re.search(rb"<style|<script(?![^>]* src=)|\s(style|on\w+)=", body)


async def test_files_of_page_and_of_apps_are_served(server: wsserver.Server) -> None:
    folder = Path(wsserver.__file__).parent / "web"
    loaded = {"index.html", "ai-sdk.js", "react.js"}
    of_npm = {"README.md", "package.json", "blocks.d.ts", "frames.d.ts"}
    files = {file.name for file in folder.glob("*.*")} - of_npm
    for file in files:
        text = (folder / file).read_text(errors="replace")
        address = r"""["'](?:\./)?([\w./-]+\.\w+)["']"""
        loaded |= set(re.findall(rf"""(?:href=|src=|"src": |from ){address}""", text))
    assert loaded - {"libraries/markdown.js"} == files
    for name in (*of_npm, "index.html", "libraries", "libraries/markdown.d.ts"):
        assert (await get(server, name))[0] == 404, name
    types = {
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "html": "text/html; charset=utf-8",
        "webmanifest": "application/manifest+json",
        "png": "image/png",
    }
    for name in loaded - {"libraries/markdown.js"}:
        status, headers, body = await get(server, name.replace("index.html", ""))
        whole = (folder / name).read_bytes()
        assert (status, body) == (200, without_comments(whole) if name.endswith("js") else whole)
        assert headers["content-type"] == types[name.rpartition(".")[2]]


def test_page_preloads_each_script_that_its_scripts_import() -> None:
    folder = Path(wsserver.__file__).parent / "web"
    preloaded = re.findall(r'"modulepreload" href="(.+)"', (folder / "index.html").read_text())
    loaded = {"page.js", "preferences.js"}
    imported: set[str] = set()
    while loaded - {"libraries/markdown.js"}:
        text = "".join((folder / name).read_text() for name in loaded if "/" not in name)
        loaded = set(re.findall(r"^(?:import|.* from) '\./(.+)'", text, re.MULTILINE)) - imported
        imported |= loaded
    assert sorted(preloaded) == sorted(imported)


def test_scripts_without_comments_are_the_same_programs(tmp_path: Path) -> None:
    """Compare the scripts as a minifier prints them."""
    esbuild = require_npm_package("esbuild") / "bin/esbuild"
    scripts = sorted((Path(wsserver.__file__).parent / "web").glob("*.js"))
    for script in scripts:
        whole = script.read_bytes()
        short = without_comments(whole)
        assert short.startswith(whole[: whole.index(b"*/")])
        assert short.count(b"\n") == whole.count(b"\n")
        (tmp_path / script.name).write_bytes(short)
    options = ("--minify-whitespace", "--format=esm", "--legal-comments=none")
    for source, made in ((scripts[0].parent, "whole"), (tmp_path, "short")):
        files = [source / script.name for script in scripts]
        command: list[str | Path] = [esbuild, *files, *options, f"--outdir={tmp_path / made}"]
        subprocess.run(command, check=True, capture_output=True)
    for script in scripts:
        whole, short = ((tmp_path / made / script.name).read_bytes() for made in ("whole", "short"))
        assert whole == short, script


async def test_files_are_compressed_for_clients_that_take_gzip(server: wsserver.Server) -> None:
    _, headers, whole = await get(server, "client.js", "Accept-Encoding: gzip;q=0, br\n")
    assert headers["vary"].lower() == "accept-encoding"
    assert "content-encoding" not in headers
    for codings in ("gzip", "br, GZIP;q=0.5", "gzip ;q=1.0"):
        _, headers, body = await get(server, "client.js", f"Accept-Encoding: {codings}\n")
        assert headers["content-encoding"] == "gzip"
        assert gzip.decompress(body) == whole
        assert len(body) < len(whole) / 2


async def test_libraries_come_with_their_fonts_and_licences(server: wsserver.Server) -> None:
    require_libraries()
    types = {
        "markdown.js": "text/javascript; charset=utf-8",
        "code.js": "text/javascript; charset=utf-8",
        "math.js": "text/javascript; charset=utf-8",
        "math.css": "text/css; charset=utf-8",
        "LICENSES.txt": "text/plain; charset=utf-8",
        "fonts/KaTeX_Main-Regular.woff2": "font/woff2",
    }
    for name, kind in types.items():
        status, headers, body = await get(server, f"libraries/{name}")
        assert (status, headers["content-type"]) == (200, kind), name
        assert len(body) > 1000
    for name in ("stamp", "../package.json", "package.json", "fonts/", ""):
        assert (await get(server, f"libraries/{name}"))[0] == 404, name
    _, _, licences = await get(server, "libraries/LICENSES.txt")
    for package in (b"dompurify", b"highlight.js", b"katex", b"marked", b"remend"):
        assert b"\n%b\n==" % package in b"\n" + licences
    _, _, style = await get(server, "libraries/math.css")
    for font in set(re.findall(r"url\(([^)]*)\)", style.decode())):
        assert (await get(server, f"libraries/{font}"))[0] == 200, font


async def test_page_without_libraries_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, puppet: Puppet
) -> None:
    monkeypatch.setattr("wsserver.page.BUILT", "missing")
    caplog.set_level("INFO", "wsserver")
    async with wsserver.serve(puppet, port=0) as server:
        for _ in range(2):
            status, _, body = await get(server, "libraries/markdown.js")
            assert (status, body) == (200, b"export {}\n")
    lines = [record for record in caplog.records if "page without Markdown" in record.getMessage()]
    assert len(lines) == 1


async def get(
    server: wsserver.Server, path: str, headers: str = ""
) -> tuple[int, dict[str, str], bytes]:
    return await ask(server, f"GET /{path} HTTP/1.1\nHost: localhost\n{headers}\n")


@pytest.mark.parametrize("path", ["/", "/client.js"])
async def test_unchanged_file_is_answered_with_304(server: wsserver.Server, path: str) -> None:
    request = f"GET {path} HTTP/1.1\nHost: localhost\n"
    _, headers, _ = await ask(server, f"{request}\n")
    tag, size = headers["etag"], headers["content-length"]
    status, headers, body = await ask(server, f'{request}If-None-Match: {tag}, "b"\n\n')
    assert (status, body, headers["content-length"]) == (304, b"", size)
    status, headers, _ = await ask(server, f'{request}If-None-Match: "b"\n\n')
    assert (status, headers["etag"]) == (200, tag)


@pytest.mark.parametrize(
    ("request_line", "status", "header"),
    [
        ("GET /?from=bookmark HTTP/1.1", 200, None),
        ("GET /healthz HTTP/1.1", 200, None),
        ("GET /healthz HTTP/1.0", 200, None),
        ("GET /nowhere HTTP/1.1", 404, None),
        ("GET /../etc/passwd HTTP/1.1", 404, None),
        ("GET /client.js HTTP/1.1", 200, ("cache-control", "no-cache")),
        ("POST /client.js HTTP/1.1", 405, ("allow", "get, head")),
        ("GET /ws HTTP/1.1", 426, ("upgrade", "websocket")),
        ("BREW / HTTP/1.1", 501, None),
        ("GET / HTTP/1.1\nUpgrade: websocket\nUpgrade: h2c", 426, None),
        ("DELETE / HTTP/1.1", 405, ("allow", "get, head")),
        ("POST /healthz HTTP/1.1", 405, ("allow", "get, head")),
    ],
)
async def test_other_requests_get_http_status(
    server: wsserver.Server, request_line: str, status: int, header: tuple[str, str] | None
) -> None:
    got, headers, body = await ask(server, f"{request_line}\nHost: localhost\n\n")
    assert got == status
    assert int(headers["content-length"]) == len(body) > 0
    if header is not None:
        assert headers[header[0]] == header[1]


async def test_request_with_body_is_answered(server: wsserver.Server) -> None:
    status, headers, body = await ask(
        server, 'POST / HTTP/1.1\nHost: localhost\nContent-Length: 15\n\n{"prompt": "x"}'
    )
    assert (status, headers["allow"]) == (405, "get, head")
    assert int(headers["content-length"]) == len(body)


async def test_pipelined_request_is_not_answered(
    server: wsserver.Server, caplog: pytest.LogCaptureFixture
) -> None:
    status, _, body = await ask(server, "GET /healthz HTTP/1.1\nHost: localhost\n\n" * 2)
    assert (status, body) == (200, b"ok\n")
    assert not [record for record in caplog.records if record.exc_info]


async def test_request_sent_byte_by_byte_is_answered(server: wsserver.Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nmore":
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(BOUND):
        assert (await reader.read()).endswith(b"ok\n")
    writer.close()
    await writer.wait_closed()


async def test_head_response_equals_get_without_body(server: wsserver.Server) -> None:
    _, got, body = await ask(server, "GET / HTTP/1.1\nHost: localhost\n\n")
    status, headers, nothing = await ask(server, "HEAD / HTTP/1.1\nHost: localhost\n\n")
    assert (status, nothing) == (200, b"")
    assert headers == got
    assert int(headers["content-length"]) == len(body)


@pytest.mark.parametrize("path", ["", "ws", "?token=x"])
async def test_websocket_is_served_at_root_and_ws(server: wsserver.Server, path: str) -> None:
    async with connect(server.url + path, proxy=None) as socket:
        await socket.send('{"type": "ping"}')
        async with asyncio.timeout(BOUND):
            assert await socket.recv() == '{"type":"pong"}'


async def test_websocket_at_other_path_is_not_found(server: wsserver.Server) -> None:
    with pytest.raises(InvalidStatus) as raised:
        async with connect(server.url + "nowhere", proxy=None):
            raise AssertionError
    assert raised.value.response.status_code == 404


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (None, None),
        (["wsserver.v1"], "wsserver.v1"),
        (["other", "wsserver.v1"], "wsserver.v1"),
        (["other"], None),
    ],
)
async def test_subprotocol_is_chosen_if_offered(
    server: wsserver.Server, offered: list[Subprotocol] | None, chosen: str | None
) -> None:
    async with connect(server.url, subprotocols=offered, proxy=None) as socket:
        assert socket.subprotocol == chosen


async def test_unfinished_handshake_is_closed_after_open_timeout(puppet: object) -> None:
    async with wsserver.serve(puppet, port=0, open_timeout=0.05) as server:  # type: ignore[arg-type]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\n")
        async with asyncio.timeout(BOUND):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
