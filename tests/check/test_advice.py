"""Advice, and the responses by which proxies and the server are recognized."""

import httpx2
import pytest

import wsserver
from tests.support.puppet import Puppet
from wsserver import Settings
from wsserver.doctor import advice
from wsserver.doctor.handshakes import BODIES, NO_TOKEN, NOT_FOUND

ALL = {name: value for name, value in vars(advice).items() if name.isupper() and name != "NAMES"}


@pytest.mark.parametrize(
    ("headers", "body", "proxy"),
    [
        ({"server": "nginx/1.22.1"}, "", "nginx"),
        ({"server": "openresty"}, "", "nginx"),
        ({"server": "Caddy"}, "", "caddy"),
        ({"via": "1.1 Caddy"}, "", "caddy"),
        ({"server": "cloudflare", "cf-ray": "x"}, "", "cloudflare"),
        ({"server": "nginx", "cf-ray": "x"}, "", "cloudflare"),
        ({"server": "awselb/2.0"}, "", "alb"),
        ({"server": "Apache/2.4"}, "", "apache"),
        ({}, "<html><body><h1>503 Service Unavailable</h1>", "haproxy"),
        ({"server": "uvicorn"}, "<html>", None),
    ],
)
def test_proxy_is_recognized(headers: dict[str, str], body: str, proxy: str | None) -> None:
    assert advice.recognize(headers, body) == proxy


def test_advice_is_for_known_proxy_alone() -> None:
    (line,) = advice.advise(advice.BODY, "nginx")
    assert line.startswith("nginx: ")


def test_advice_for_unknown_proxy_names_all() -> None:
    lines = advice.advise(advice.IDLE, None)
    assert [line.partition(":")[0] for line in lines[:-1]] == list(advice.NAMES.values())
    assert "ping_interval" in lines[-1]


def test_settings_that_advice_names_exist() -> None:
    text = repr(ALL)
    for name in ("ping_interval", "hosts", "origins", "proxies", "allow_anonymous", "token_file"):
        assert name in text
        assert name in Settings.model_fields


async def test_server_still_sends_known_bodies() -> None:
    async with (
        wsserver.serve(Puppet(), port=0, connections=2, connections_per_address=1) as server,
        httpx2.AsyncClient(base_url=server.url.replace("ws", "http", 1)) as client,
    ):
        bodies = [
            (await client.get(path, headers=headers)).text
            for path, headers in (
                ("/", {}),
                ("/ws", {}),
                ("/", {"Host": "else.example"}),
                ("/", {"X-Forwarded-For": "192.0.2.1"}),
                ("/else", {}),
            )
        ]
    assert bodies[-1] == NOT_FOUND
    source = "".join(bodies)
    unseen = {sign for sign, *_ in BODIES if sign not in source}
    assert unseen == {
        "Failed to open a WebSocket connection",  # of the library
        "The plain HTTP request was sent to HTTPS port",  # of nginx
        "its maximum number of connections",
    }


async def test_server_refuses_missing_token_with_known_body(tmp_path: object) -> None:
    async with wsserver.serve(Puppet(), port=0, jwt_secret="x" * 32) as server:
        async with httpx2.AsyncClient(base_url=server.url.replace("ws", "http", 1)) as client:
            response = await client.get("/api/chat/x")
    assert response.status_code == 401
    assert NO_TOKEN in response.text
