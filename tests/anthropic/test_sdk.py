"""Configuration of Anthropic's SDK by the environment, and renewal of credentials."""

import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import wsserver
from tests.support.client import client
from tests.support.upstream import Answer, Received, Script, Upstream, error, reply
from wsserver.errors import ConfigError
from wsserver.models.anthropic import Anthropic
from wsserver.models.anthropic.sdk import Sdk
from wsserver.settings import Settings

MODEL = "claude-sonnet-4-6"


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as running:
        yield running


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, upstream: Upstream, tmp_path: Path) -> None:
    for name in ("API_KEY", "AUTH_TOKEN", "PROFILE"):
        monkeypatch.delenv(f"ANTHROPIC_{name}", raising=False)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("ANTHROPIC_BASE_URL", upstream.url)


async def ask(upstream: Upstream, prompts: int = 1) -> list[Received]:
    """Send prompts to a new server, and return the requests to the API."""
    async with wsserver.serve(port=0, drain_timeout=0, retries=0) as server:
        async with client(server) as chat:
            for _ in range(prompts):
                await chat.text((await chat.prompt())["id"])
    return [received for received in upstream.requests if received.path.endswith("/messages")]


# Headers and addresses


async def test_key_version_and_environment_headers_are_sent(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "x-team: blue\nanthropic-beta: one,two")
    first, second = await ask(upstream, 2)
    for received in (first, second):
        assert "sk-secret" in str(received.headers)
        assert received.headers["x-team"] == "blue"
        assert received.headers["anthropic-beta"] == "one,two"
        assert received.headers["content-type"] == "application/json"
        assert received.headers["accept-encoding"] == "identity"
        assert received.headers["host"] == upstream.url.removeprefix("http://")
        assert received.headers["content-length"] == str(len(received.raw))
        assert "anthropic-version" in received.headers
        assert "anthropic" in received.headers["user-agent"].lower()
    assert {**first.headers, "content-length": ""} == {**second.headers, "content-length": ""}


async def test_auth_token_is_sent_as_bearer_token(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "token-secret")
    (received,) = await ask(upstream)
    assert received.headers["authorization"] == "Bearer token-secret"


async def test_base_url_with_path_is_used(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", f"{upstream.url}/gateway/eu")
    upstream.pages["/gateway/eu/v1/messages"] = lambda _: reply("Hello")
    (received,) = await ask(upstream)
    assert (received.method, received.path) == ("POST", "/gateway/eu/v1/messages")


# Credentials that can be renewed


class Issuer:
    """Exchanges identity tokens for access tokens, as the API does."""

    def __init__(self, upstream: Upstream, lifetime: int = 3600) -> None:
        self.lifetime = lifetime
        self.answer: Answer | None = None
        self.requests: list[Received] = []
        upstream.pages["/v1/oauth/token"] = self._issue

    def _issue(self, received: Received) -> Script:
        self.requests.append(received)
        if self.answer is not None:
            return Script((self.answer,))
        token = {"access_token": f"token-{len(self.requests)}", "expires_in": self.lifetime}
        return Script((Answer(200, "application/json", json.dumps(token)),))


@pytest.fixture
def issuer(monkeypatch: pytest.MonkeyPatch, upstream: Upstream) -> Issuer:
    monkeypatch.setenv("ANTHROPIC_IDENTITY_TOKEN", "an.identity.token")
    monkeypatch.setenv("ANTHROPIC_FEDERATION_RULE_ID", "rule")
    monkeypatch.setenv("ANTHROPIC_ORGANIZATION_ID", "organization")
    return Issuer(upstream)


async def test_federated_token_is_fetched_once_for_many_prompts(
    upstream: Upstream, issuer: Issuer
) -> None:
    received = await ask(upstream, 3)
    assert [each.headers["authorization"] for each in received] == ["Bearer token-1"] * 3
    assert "oauth" in received[0].headers["anthropic-beta"]
    assert len(issuer.requests) == 1


async def test_refused_token_is_renewed_and_prompt_retried(
    upstream: Upstream, issuer: Issuer
) -> None:
    upstream.play(reply("One"), error(401, "authentication_error"), reply("Two"))
    received = await ask(upstream, 2)
    tokens = [each.headers["authorization"] for each in received]
    assert tokens == ["Bearer token-1", "Bearer token-1", "Bearer token-2"]


async def test_refused_renewed_token_is_error(upstream: Upstream, issuer: Issuer) -> None:
    upstream.default = Script((error(401, "authentication_error"),))
    received = await ask(upstream)
    assert [each.headers["authorization"] for each in received] == [
        "Bearer token-1",
        "Bearer token-2",
    ]


async def test_token_is_renewed_before_expiry(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, issuer: Issuer
) -> None:
    monkeypatch.setattr("wsserver.models.anthropic.templates.TEMPLATE_TIME", 0.0)
    issuer.lifetime = 20  # seconds; the SDK renews a token with less life for each request
    received = await ask(upstream, 2)
    tokens = [each.headers["authorization"] for each in received]
    assert tokens == ["Bearer token-1", "Bearer token-2"]


async def test_refused_key_is_not_retried(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    upstream.default = Script((error(401, "authentication_error"),))
    assert len(await ask(upstream)) == 1


@pytest.mark.parametrize(
    ("status", "code"), [(400, "credentials"), (401, "credentials"), (503, "upstream_error")]
)
async def test_failed_token_exchange_is_retried_for_next_prompt(
    upstream: Upstream, issuer: Issuer, status: int, code: str
) -> None:
    issuer.answer = Answer(status, "application/json", '{"error": "no"}')
    async with wsserver.serve(port=0, drain_timeout=0, retries=0) as server:
        async with client(server) as chat:
            failed = (await chat.text((await chat.prompt())["id"]))[1]
            issuer.answer = None
            text, _ = await chat.text((await chat.prompt())["id"])
    assert (failed["code"], text) == (code, "Hello world")


async def test_unreachable_token_issuer_is_error(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, issuer: Issuer
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    async with wsserver.serve(port=0, drain_timeout=0, retries=0) as server:
        async with client(server) as chat:
            failed = (await chat.text((await chat.prompt())["id"]))[1]
    assert failed["code"] == "unreachable"


async def test_profile_of_config_folder_is_used(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, tmp_path: Path
) -> None:
    for folder in ("configs", "credentials"):
        (tmp_path / folder).mkdir()
    config = {"authentication": {"type": "user_oauth"}, "base_url": upstream.url}
    (tmp_path / "configs" / "work.json").write_text(json.dumps(config))
    credentials = {"access_token": "token-of-profile", "expires_at": None}
    (tmp_path / "credentials" / "work.json").write_text(json.dumps(credentials))
    (tmp_path / "credentials" / "work.json").chmod(0o600)
    monkeypatch.setenv("ANTHROPIC_PROFILE", "work")
    monkeypatch.delenv("ANTHROPIC_BASE_URL")
    (received,) = await ask(upstream)
    assert received.headers["authorization"] == "Bearer token-of-profile"


# When the SDK is imported


def test_server_starts_without_importing_sdk() -> None:
    program = "import sys, wsserver.cli, wsserver.models.anthropic; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert not {"anthropic", "httpx2"} & set(done.stdout.decode().split())


async def test_sdk_is_imported_after_server_listens(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    made: list[str] = []

    def load(model: str) -> Sdk:
        made.append(threading.current_thread().name)
        return Sdk(model)

    monkeypatch.setattr("wsserver.models.anthropic.sdk.Sdk", load)
    async with wsserver.serve(port=0, drain_timeout=0) as server:
        await server.prepared()
        assert len(made) == 1
        assert made[0] != threading.main_thread().name
        async with client(server) as chat:
            assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello world"
    assert len(made) == 1


# Checks at the start


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ANTHROPIC_PROFILE", "does-not-exist"),
        ("ANTHROPIC_API_KEY", ""),
        ("ANTHROPIC_API_KEY", "sk-secret\n"),
        ("ANTHROPIC_API_KEY", "sk-secrét"),
        ("ANTHROPIC_BASE_URL", "ftp://example"),
        ("ANTHROPIC_BASE_URL", "api.example"),
        ("ANTHROPIC_BASE_URL", "http://[/"),
        ("ANTHROPIC_BASE_URL", ""),
    ],
)
def test_invalid_environment_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    if name == "ANTHROPIC_BASE_URL":
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        Anthropic(MODEL, Settings())
    assert "secr" not in str(refused.value)


async def test_unreadable_trust_settings_are_named_in_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "https://127.0.0.1:1")
    monkeypatch.setenv("SSL_CERT_FILE", "/does/not/exist")
    async with wsserver.serve(port=0, drain_timeout=0, retries=0) as server:
        await server.prepared()
        async with client(server) as chat:
            failed = (await chat.text((await chat.prompt())["id"]))[1]
    assert failed["code"] == "internal"
    assert "SSL_CERT_FILE" in caplog.text


async def test_header_with_line_break_is_not_sent_and_named_in_log(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "x-one: a\rx-two: b")
    async with wsserver.serve(port=0, drain_timeout=0) as server, client(server) as chat:
        failed = (await chat.text((await chat.prompt())["id"]))[1]
    assert (failed["code"], upstream.requests) == ("internal", [])
    assert "x-one" in caplog.text
