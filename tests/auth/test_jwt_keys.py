"""How the keys of JSON Web Tokens are read and fetched."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

import wsserver
from tests.auth.issuer import (
    HERE,
    SECRET,
    Clock,
    Issuer,
    authenticator,
    claims,
    fetching,
    forged,
    key_set,
    part,
    public,
    serving,
    sign,
)
from tests.support.client import client
from tests.support.puppet import BOUND
from tests.support.upstream import refused_url, tls_server
from wsserver import ConfigError, Settings
from wsserver.auth import close, jwks, make, reload, tokens
from wsserver.auth.base import Principal, Unavailable

# Keys in a file.

UNUSABLE: list[Any] = [
    {"kty": "oct", "k": part(SECRET.encode()), "kid": "a"},
    {"kty": "OKP", "crv": "X25519", "x": part(b"x" * 32)},
    {"kty": "RSA", "n": "AQAB"},
    {"kty": "RSA", "n": 5, "e": "AQAB"},
    {"kty": "RSA", "n": "", "e": ""},
    {"kty": "EC", "crv": "P-256", "x": part(b"x" * 32), "y": part(b"y" * 32)},
    {"kty": "new"},
    {"kty": ["RSA"]},
    {},
    7,
    None,
    ["RSA"],
]


@pytest.mark.parametrize(
    "key",
    [
        *UNUSABLE,
        lambda: public("weak"),
        lambda: public("p384"),
        lambda: public("rsa-1", use="enc"),
        lambda: public("rsa-1", key_ops=["encrypt"]),
        lambda: public("rsa-1", key_ops=None),
        lambda: public("rsa-1", alg="RSA-OAEP"),
        lambda: public("rsa-1", alg="HS256"),
        lambda: public("rsa-1", alg=None),
        lambda: public("rsa-1", kid=False, kty="EC"),
        lambda: public("rsa-1", kid=False) | {"kid": 7},
    ],
)
async def test_key_for_other_use_is_ignored(key: Any, keys_file: Callable[..., str]) -> None:
    key = key() if callable(key) else key
    with pytest.raises(ConfigError, match="no usable key"):
        authenticator(jwt_jwks=keys_file(key))
    check = authenticator(jwt_jwks=keys_file(key, "rsa-2"))
    assert await check(sign("rsa-2"), HERE) is not None
    assert await check(sign("rsa-2", kid=None), HERE) is not None
    assert (
        await check(forged({"alg": "HS256", "kid": "a"}, claims(), SECRET.encode()), HERE) is None
    )


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"7", b"{}", b'{"keys": {}}', b"\xff"])
def test_invalid_key_set_is_one_line_error(document: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(document)
    with pytest.raises(ConfigError, match="not a JSON Web Key Set"):
        authenticator(jwt_jwks=str(path))


async def test_reload_reads_key_file_and_ignores_invalid_file(
    keys_file: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    path = keys_file("rsa-1")
    check = authenticator(jwt_jwks=path)
    keys_file("rsa-2")
    assert await check(sign("rsa-2"), HERE) is None
    await check.reload()
    assert await check(sign("rsa-2"), HERE) is not None
    assert await check(sign("rsa-1"), HERE) is None
    assert not caplog.records
    for spoil in (lambda: Path(path).write_text("oops"), lambda: Path(path).unlink()):
        spoil()
        await check.reload()
        assert await check(sign("rsa-2"), HERE) is not None
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
    assert "keys not reloaded" in caplog.text
    await check.aclose()


# Keys at an address.


async def test_keys_are_fetched_at_first_use_and_when_old(issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url, clock) as check:
        assert issuer.paths == []
        for _ in range(2):
            assert await check(sign("rsa-1"), HERE) is not None
            assert issuer.paths == ["/keys"]
        clock.now += 3599
        issuer.body = key_set("rsa-2")
        assert await check(sign("rsa-1"), HERE) is not None
        clock.now += 1
        old = sign("rsa-1")
        assert await check(old, HERE) is not None  # and the keys are fetched meanwhile
        async with asyncio.timeout(BOUND):
            while await check(old, HERE) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert await check(sign("rsa-2"), HERE) is not None
        assert len(issuer.paths) == 2


async def test_key_withdrawn_during_pause_is_refused(issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url, clock) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        issuer.body = key_set("rsa-2")
        clock.now += 7200
        assert await check(sign("rsa-1"), HERE) is None


async def test_hanging_issuer_does_not_delay_known_keys(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT", 3600.0)
    monkeypatch.setattr("wsserver.auth.jwt.PATIENCE", 0.05)
    async with fetching(issuer.url, clock) as check:
        async with asyncio.timeout(BOUND):
            while True:  # on a busy machine the first fetch may take longer than PATIENCE
                with contextlib.suppress(Unavailable):
                    assert await check(sign("rsa-1"), HERE) is not None
                    break
        issuer.open.clear()
        for _ in range(3):
            clock.now += 3600
            known = check(sign("rsa-1"), HERE)
            # The test drives the coroutine: a wait for the event loop would yield.
            with pytest.raises(StopIteration) as returned:
                known.send(None)
            assert returned.value.value.name == "ada"
            await issuer.asked(2)
            with pytest.raises(Unavailable):  # after PATIENCE
                await check(sign("rsa-2"), HERE)
        assert len(issuer.paths) == 2
        reloading = asyncio.create_task(check.reload())
        await asyncio.sleep(0)
        assert await check(sign("rsa-1"), HERE) is not None
        assert not reloading.done()
        issuer.body = key_set("rsa-1", "rsa-2")
        issuer.open.set()
        assert await reloading
        assert await check(sign("rsa-2"), HERE) is not None


async def test_failed_reload_is_reported_each_time_and_changes_nothing(
    issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    async with fetching(issuer.url) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        issuer.status = "500 Oh"
        for times in (1, 2):
            assert not await check.reload()
            assert caplog.text.count("known keys stay in use") == times
        assert await check(sign("rsa-1"), HERE) is not None


async def test_unknown_keys_at_hanging_issuer_do_not_delay_known_logins(
    issuer: Issuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with wsserver.serve(
        "demo",
        port=0,
        authenticate=authenticator(clock, jwt_jwks=issuer.url, open_timeout=1),
        open_timeout=1,
    ) as server:

        async def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {sign(key)}"}
            try:
                async with client(server, additional_headers=headers):
                    return 101
            except InvalidStatus as refused:
                return refused.response.status_code

        assert await status("rsa-1") == 101
        clock.now += 30
        issuer.open.clear()
        strangers = [asyncio.create_task(status("rsa-9")) for _ in range(20)]
        await issuer.asked(2)
        assert await status("rsa-1") == 101
        assert set(await asyncio.gather(*strangers)) == {503}
        assert len(issuer.paths) == 2
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("kid", ["", None])
async def test_unknown_key_is_fetched(kid: str | None, issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url, clock) as check:
        assert await check(sign("rsa-1", kid=kid), HERE) is not None
        issuer.body = key_set("rsa-1", "rsa-2")
        clock.now += 30
        assert await check(sign("rsa-2", kid=kid), HERE) is not None
        assert await check(sign("rsa-1", kid=kid), HERE) is not None
        assert len(issuer.paths) == 2


async def test_forged_tokens_cause_few_fetches(issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url, clock) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        for second in range(1, 62):
            clock.now += 1
            assert await check(sign("rsa-9", kid=f"made-up-{second}"), HERE) is None
            assert await check(sign("rsa-9", kid=None), HERE) is None
        assert len(issuer.paths) == 3
        clock.now += 30
        for token in (
            sign("rsa-9", kid="rsa-1"),  # a known kid
            forged({"alg": "none", "kid": "x"}, claims()),
            forged({"alg": "HS256", "kid": "x"}, claims(), b"x"),
            sign("ec-1", "ES256", kid="rsa-1"),
            sign("rsa-1", payload=claims(exp=1)),
        ):
            assert await check(token, HERE) is None
        assert len(issuer.paths) == 3


async def test_concurrent_logins_share_fetch_and_survive_cancellation(issuer: Issuer) -> None:
    issuer.open.clear()
    async with fetching(issuer.url) as check:
        waiting = [asyncio.create_task(check(sign("rsa-1"), HERE)) for _ in range(20)]
        await issuer.asked(1)
        waiting[0].cancel()
        await asyncio.sleep(0)
        issuer.open.set()
        first, *others = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError)
        assert all(isinstance(other, Principal) for other in others)
        assert len(issuer.paths) == 1


async def test_known_key_does_not_wait_for_fetch_of_unknown_key(
    issuer: Issuer, clock: Clock
) -> None:
    async with fetching(issuer.url, clock) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        clock.now += 30
        issuer.open.clear()
        other = asyncio.create_task(check(sign("rsa-2"), HERE))
        await issuer.asked(2)
        assert await check(sign("rsa-1"), HERE) is not None
        assert not other.done()
        issuer.open.set()
        assert await other is None


def _slow(issuer: Issuer) -> None:
    issuer.open.clear()


def _huge(issuer: Issuer) -> None:
    issuer.body = key_set("rsa-1") + b" " * (256 * 1024)


def _redirecting(issuer: Issuer) -> None:
    issuer.status = "302 Found"
    issuer.headers = "Location: /elsewhere\r\n"


def _failing(issuer: Issuer) -> None:
    issuer.status = "503 Service Unavailable"


def _not_json(issuer: Issuer) -> None:
    issuer.body = b"<html>"


def _without_keys(issuer: Issuer) -> None:
    issuer.body = key_set({"kty": "oct", "k": part(SECRET.encode())})


def _cut_off(issuer: Issuer) -> None:
    issuer.headers = "Transfer-Encoding: chunked\r\n"


def _not_http(issuer: Issuer) -> None:
    issuer.status = "\0"


FAULTS = [
    (_slow, "no answer within 0.5 s"),
    (_huge, "over 262144 bytes"),
    (_redirecting, "status 302"),
    (_failing, "status 503"),
    (_not_json, "not a JSON Web Key Set"),
    (_without_keys, "no usable key"),
    (_cut_off, "Error"),
    (_not_http, "Error"),
]


@pytest.mark.parametrize(("spoil", "says"), FAULTS)
async def test_authentication_is_unavailable_until_keys_are_fetched(
    spoil: Callable[[Issuer], None],
    says: str,
    issuer: Issuer,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "wsserver")
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT", 0.5)
    good = issuer.body
    spoil(issuer)
    async with fetching(issuer.url, clock) as check:
        for _ in range(3):
            with pytest.raises(Unavailable):
                await check(sign("rsa-1"), HERE)
        assert issuer.paths == ["/keys"]
        clock.now += 5
        with pytest.raises(Unavailable):
            await check(sign("rsa-1"), HERE)
        assert issuer.paths == ["/keys"] * 2
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert says in caplog.text
        issuer.body, issuer.status, issuer.headers = good, "200 OK", ""
        issuer.open.set()
        clock.now += 5
        assert await check(sign("rsa-1"), HERE) is not None
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize(("spoil", "says"), FAULTS)
async def test_old_keys_stay_in_use_while_renewal_fails(
    spoil: Callable[[Issuer], None],
    says: str,
    issuer: Issuer,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT", 0.5)
    async with fetching(issuer.url, clock) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        spoil(issuer)
        for _ in range(2):
            clock.now += 3600
            for _ in range(2):
                assert await check(sign("rsa-1"), HERE) is not None
                with pytest.raises(Unavailable):  # a newer key may have signed the token
                    await check(sign("rsa-2"), HERE)
        assert len(issuer.paths) == 3
        assert len(caplog.records) == 1  # for the whole outage
        assert says in caplog.text
        assert "known keys stay in use" in caplog.text


async def test_unreachable_issuer_is_unavailable_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with refused_url() as url:
        async with fetching(f"{url}/keys?private=part") as check:
            with pytest.raises(Unavailable):
                await check(sign("rsa-1"), HERE)
    assert "ConnectError" in caplog.text
    assert "private" not in caplog.text


async def test_untrusted_certificate_is_refused() -> None:
    async with serving(tls_server()) as issuer:
        issuer.body = key_set("rsa-1")
        async with fetching(issuer.url) as check:
            with pytest.raises(Unavailable):
                await check(sign("rsa-1"), HERE)
        assert issuer.paths == []


async def test_environment_proxy_is_not_used_for_http(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as proxy:
        proxy.body = key_set("rsa-9")
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with fetching(issuer.url) as check:
            assert await check(sign("rsa-1"), HERE) is not None
        assert proxy.paths == []


async def test_reload_fetches_keys_at_once(issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url, clock) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        issuer.body = key_set("rsa-2")
        await check.reload()
        assert await check(sign("rsa-1"), HERE) is None
        assert len(issuer.paths) == 2


async def test_aclose_cancels_running_fetch(issuer: Issuer) -> None:
    issuer.open.clear()
    async with fetching(issuer.url) as check:
        waiting = asyncio.create_task(check(sign("rsa-1"), HERE))
        await issuer.asked(1)
    with pytest.raises(Unavailable):
        await waiting


async def test_file_tokens_work_while_issuer_is_down() -> None:
    token, line = tokens.new("ada")
    with refused_url() as url:
        settings = Settings.load(tokens=line, jwt_jwks=f"{url}/keys", jwt_audience="chat")
        check = make(settings)
        assert check is not None
        assert await check(token, HERE) == Principal("ada")
        with pytest.raises(Unavailable):
            await check(sign("rsa-1"), HERE)
        assert await check(None, HERE) is None
        assert await reload(check) is False
        await close(check)
