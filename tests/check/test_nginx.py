"""Checks through a real nginx, in one right and in many wrong configurations."""

from dataclasses import replace
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

import wsserver
from tests.check.conftest import BRIEF, PACE, RATE, Behind, checked
from tests.support.gateways import nginx
from wsserver.doctor.findings import Status
from wsserver.models.demo import Demo

pytestmark = pytest.mark.slow

HTTP_1_1 = "proxy_http_version 1.1;\n"
UPGRADE = 'proxy_set_header Upgrade $http_upgrade;\nproxy_set_header Connection "upgrade";\n'
HOST = "proxy_set_header Host $http_host;\n"
ADDRESS = "proxy_set_header X-Forwarded-For $remote_addr;\n"
RIGHT = HTTP_1_1 + UPGRADE + HOST + ADDRESS
GZIP = "gzip on; gzip_types text/event-stream; gzip_proxied any;\n"
IDLE = replace(PACE, idle=2.0)
PACES = {"short time-out": replace(BRIEF, idle=2.0), "buffered stream": PACE}


def location(directives: str, path: str = "/") -> str:
    return f"location {path} {{ proxy_pass http://127.0.0.1:PORT;\n{directives} }}"


async def test_right_configuration_holds(behind: Behind, folder: Path) -> None:
    site = location(RIGHT).replace("PORT", str(behind.port))
    async with nginx(folder, site) as url:
        found = await checked(url, behind.token, IDLE)
    assert found.of(Status.OK) == found.findings.keys() - {"tls"}
    assert found.deployment.proxy == "nginx"


WRONG = {
    "no upgrade": (location(HTTP_1_1 + HOST), {"upgrade"}, "proxy_set_header Upgrade"),
    "upgrade over HTTP/1.0": (location(UPGRADE + HOST), {"upgrade"}, "proxy_http_version 1.1;"),
    "no Host": (
        location(HTTP_1_1 + UPGRADE + ADDRESS),
        {"origin"},
        "proxy_set_header Host $http_host;",
    ),
    "short time-out": (location(RIGHT + "proxy_read_timeout 1s;"), {"idle"}, "proxy_read_timeout"),
    "buffered stream": (
        location(RIGHT + "proxy_ignore_headers X-Accel-Buffering;" + GZIP),
        {"sse"},
        "proxy_buffering off;",
    ),
    "small bodies": (
        location(RIGHT + "client_max_body_size 64k;"),
        {"http"},
        "client_max_body_size 2m;",
    ),
    "socket only": (location(RIGHT, "= /"), {"http"}, "`location` with `proxy_pass`"),
    "no token": (
        location(RIGHT + 'proxy_set_header Authorization "";'),
        {"authentication", "http"},
        "remove `proxy_set_header Authorization …`",
    ),
    "nothing behind": (
        location(RIGHT).replace("PORT", "1"),
        {"upgrade", "http"},
        "`proxy_pass` must name the address",
    ),
    "forbidden": ("location / { return 403; }", {"upgrade", "http"}, "`allow`, `deny`"),
    "another site": ("location / { return 200 hello; }", {"upgrade", "http"}, "`location` with"),
    "redirect": (
        "location / { return 301 https://chat.example.com$request_uri; }",
        {"upgrade", "http"},
        "use the address that the redirect leads to",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_configuration_fails_with_directive(
    behind: Behind, folder: Path, wrong: str
) -> None:
    site, failing, directive = WRONG[wrong]
    async with nginx(folder, site.replace("PORT", str(behind.port))) as url:
        found = await checked(url, behind.token, PACES.get(wrong, BRIEF))
    assert found.failed() == failing, found.findings
    mend = found.mend(next(name for name in found.findings if name in failing))
    assert directive in mend
    assert "HAProxy" not in mend, "the advice is for nginx"


async def test_prefix_that_stays_in_path_fails(behind: Behind, folder: Path) -> None:
    site = location(RIGHT, "/chat/").replace("PORT", str(behind.port))
    async with nginx(folder, site) as url:
        found = await checked(f"{url}chat/", behind.token, BRIEF)
    assert "upgrade" in found.failed()
    assert "with the slash after PORT" in found.mend("upgrade")


async def test_prefix_that_proxy_removes_holds(behind: Behind, folder: Path) -> None:
    site = location(RIGHT, "/chat/").replace("PORT;", f"{behind.port}/;")
    async with nginx(folder, site) as url:
        found = await checked(f"{url}chat/ws", behind.token, BRIEF)
    assert found.failed() == set(), found.findings


async def test_removed_origin_is_warned_of(behind: Behind, folder: Path) -> None:
    site = location(RIGHT + 'proxy_set_header Origin "";').replace("PORT", str(behind.port))
    async with nginx(folder, site) as url:
        found = await checked(url, behind.token, BRIEF)
    assert found.of(Status.WARNING) == {"foreign_origin"}
    assert "remove `proxy_set_header Origin …`" in found.mend("foreign_origin")


async def test_removed_origin_fails_pages_that_have_no_token(behind: Behind, folder: Path) -> None:
    site = location(RIGHT + 'proxy_set_header Origin "";').replace("PORT", str(behind.port))
    async with nginx(folder, site) as url:
        found = await checked(url, None, BRIEF)
    assert found.of(Status.WARNING) == {"foreign_origin"}
    assert {"authentication", "origin"} <= found.failed()
    assert "remove `proxy_set_header Origin …`" in found.mend("origin")


async def test_fixed_host_is_warned_of(behind: Behind, folder: Path) -> None:
    site = location(RIGHT).replace("PORT", str(behind.port)).replace("$http_host", "localhost")
    async with nginx(folder, site) as url:
        found = await checked(url, behind.token, BRIEF)
    assert found.of(Status.WARNING) == {"host"}
    assert found.failed() == {"origin"}
    assert "`default_server`" in found.mend("host")


async def test_removed_subprotocol_is_warned_of(behind: Behind, folder: Path) -> None:
    site = location(RIGHT + 'proxy_set_header Sec-WebSocket-Protocol "";')
    async with nginx(folder, site.replace("PORT", str(behind.port))) as url:
        found = await checked(url, behind.token, BRIEF)
    assert found.of(Status.WARNING) == {"upgrade"}
    assert found.failed() == set(), found.findings


async def test_server_without_tokens_fails_behind_proxy(folder: Path) -> None:
    async with wsserver.serve(Demo(RATE), port=0, drain_timeout=0) as server:
        async with nginx(folder, location(RIGHT).replace("PORT", str(server.port))) as url:
            found = await checked(url, None, BRIEF)
    assert found.failed() == {"upgrade", "http"}
    assert "`wsserver token new NAME --file FILE`" in found.mend("upgrade")


async def test_full_server_fails_with_setting_of_proxies(behind: Behind, folder: Path) -> None:
    async with (
        wsserver.serve(Demo(RATE), port=0, connections_per_address=1) as server,
        nginx(folder, location(RIGHT).replace("PORT", str(server.port))) as url,
        connect(server.url, proxy=None),
    ):
        found = await checked(url, None, BRIEF)
    assert "upgrade" in found.failed()
    assert "`proxies`" in found.mend("upgrade")


async def test_host_without_answer_holds(behind: Behind, folder: Path) -> None:
    site = 'if ($host != "127.0.0.1") { return 444; }' + location(RIGHT)
    async with nginx(folder, site.replace("PORT", str(behind.port))) as url:
        found = await checked(url, behind.token, BRIEF)
    assert found.findings["host"].seen == "other host names get no answer"
    assert found.failed() == set(), found.findings


async def test_upgrade_that_gets_another_answer_than_health_fails(
    behind: Behind, folder: Path
) -> None:
    site = "location = / { return 400; }" + location(RIGHT)
    async with nginx(folder, site.replace("PORT", str(behind.port))) as url:
        found = await checked(url, behind.token, BRIEF)
    assert found.failed() == {"upgrade"}
    assert "plain requests reach the server" in found.findings["upgrade"].seen


async def test_refused_second_connection_fails_authentication(behind: Behind, folder: Path) -> None:
    site = 'if ($http_authorization = "") { return 403; }' + location(RIGHT)
    async with nginx(folder, site.replace("PORT", str(behind.port))) as url:
        found = await checked(url, behind.token, BRIEF)
    assert "authentication" in found.failed()
    assert found.findings["authentication"].seen == "another connection is refused: status 403"
