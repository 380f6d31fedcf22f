"""JSON Web Tokens: which are taken, which are not, and how the keys are come by."""

import asyncio
import base64
import hashlib
import hmac
import importlib
import json
import logging
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from pydantic import SecretStr, ValidationError
from websockets.exceptions import InvalidStatus

import wsserver
from tests.support.client import client
from tests.support.upstream import refused_url, tls_server
from wsserver import ConfigError, Settings
from wsserver.auth import jwks
from wsserver.auth.base import Handshake, Principal, Unavailable
from wsserver.auth.jwt import JwtAuthenticator
from wsserver.cli import main

SECRET = "correct horse battery staple, 32"
HERE = Handshake("127.0.0.1", "/ws", {})


@cache
def private(name: str) -> Any:
    """Return the key of that name; what it begins with is its kind."""
    match name.partition("-")[0]:
        case "rsa":
            return rsa.generate_private_key(65537, 2048)
        case "weak":
            return rsa.generate_private_key(65537, 1024)
        case "ec":
            return ec.generate_private_key(ec.SECP256R1())
        case "p384":
            return ec.generate_private_key(ec.SECP384R1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


def public(name: str, *, kid: bool = True, **members: Any) -> dict[str, Any]:
    """Return the public half of a key as a member of a key set, which has the name as its kid."""
    key = private(name).public_key()
    kinds: Any = {"rsa": RSAAlgorithm, "weak": RSAAlgorithm, "ec": ECAlgorithm, "p384": ECAlgorithm}
    kind = kinds.get(name.partition("-")[0], OKPAlgorithm)
    return dict(kind.to_jwk(key, as_dict=True)) | ({"kid": name} if kid else {}) | members


def key_set(*keys: Any) -> bytes:
    """Return a JWK Set; a string in it stands for the public key of that name."""
    items = [public(key) if isinstance(key, str) else key for key in keys]
    return json.dumps({"keys": items}).encode()


def claims(**others: Any) -> dict[str, Any]:
    return {"sub": "ada", "exp": int(time.time()) + 60, "aud": "chat"} | others


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in claims().items() if name not in names}


def sign(
    key: str, algorithm: str = "RS256", kid: str | None = "", payload: Any = None, **header: Any
) -> str:
    """Return a token signed with the key of that name, which is its kid unless told otherwise."""
    if kid is not None:
        header["kid"] = kid or key
    return jwt.encode(payload or claims(), private(key), algorithm, headers=header)


def secretly(payload: Any = None, **header: Any) -> str:
    return jwt.encode(payload or claims(), SECRET, "HS256", headers=header)


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: object, payload: object, secret: bytes | None = None) -> str:
    """Return a token that no library would make, signed with HMAC where there is a secret."""
    signed = f"{part(header)}.{part(payload)}"
    signature = b"" if secret is None else hmac.digest(secret, signed.encode(), hashlib.sha256)
    return f"{signed}.{part(signature)}"


def authenticator(**settings: Any) -> JwtAuthenticator:
    return JwtAuthenticator(Settings.load(**{"jwt_audience": "chat"} | settings))


def with_secret(**settings: Any) -> JwtAuthenticator:
    return authenticator(jwt_secret=SECRET, **settings)


@pytest.fixture
def keys_file(tmp_path: Path) -> Callable[..., str]:
    def write(*keys: Any) -> str:
        path = tmp_path / "keys.json"
        path.write_bytes(key_set(*keys))
        return str(path)

    return write


class Issuer:
    """A real HTTP server; a test sets what it answers and looks how often it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.body = b""
        self.status = "200 OK"
        self.headers = ""
        self.paths: list[str] = []
        self.arrival = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.paths.append(head.split()[1].decode())
            self.arrival.set()
            await self.open.wait()
            length = f"Content-Length: {len(self.body)}\r\n"
            answer = f"HTTP/1.1 {self.status}\r\n{length}{self.headers}Connection: close\r\n\r\n"
            writer.write(answer.encode() + self.body)
            await writer.drain()
        writer.close()

    async def asked(self, times: int) -> None:
        async with asyncio.timeout(5):
            while len(self.paths) < times:
                self.arrival.clear()
                await self.arrival.wait()


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Issuer]:
    issuer = Issuer()
    async with await asyncio.start_server(issuer.answer, "127.0.0.1", 0, ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        issuer.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/keys"
        yield issuer
        issuer.open.set()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with serving() as issuer:
        issuer.body = key_set("rsa-1")
        yield issuer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jwks.FetchedKeys.__init__, "__defaults__", (clock,))
    return clock


@asynccontextmanager
async def fetching(url: str) -> AsyncIterator[JwtAuthenticator]:
    check = authenticator(jwt_jwks=url)
    try:
        yield check
    finally:
        await check.aclose()


async def fetched(check: JwtAuthenticator) -> None:
    """Wait for the fetch that is under way in the background."""
    assert isinstance(check._source, jwks.FetchedKeys)
    assert check._source._fetching is not None
    await check._source._fetching


# What is taken.


async def test_valid_token_names_its_principal_and_expiry() -> None:
    end = int(time.time()) + 60
    check = with_secret()
    for exp in (end, end + 0.5):
        assert await check(secretly(claims(exp=exp)), HERE) == Principal("ada", exp + 10)
    assert await check(secretly(claims(aud=["x", "chat"])), HERE) is not None
    assert await check(secretly(kid="whatever"), HERE) is not None
    assert await check(None, HERE) is None
    await check.reload()
    await check.aclose()


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [("rsa-1", "RS256"), ("rsa-1", "PS256"), ("ec-1", "ES256"), ("ed-1", "EdDSA")],
)
@pytest.mark.parametrize("kid", ["", None])
async def test_each_kind_of_key_verifies_with_and_without_kid(
    key: str, algorithm: str, kid: str | None, keys_file: Callable[..., str]
) -> None:
    check = authenticator(jwt_jwks=keys_file("rsa-2", "ec-2", "rsa-1", "ec-1", "ed-1"))
    assert await check(sign(key, algorithm, kid), HERE) is not None
    assert await check(sign(key, algorithm, kid="rsa-2"), HERE) is None
    assert await check(sign(f"{key}0", algorithm, kid), HERE) is None


async def test_kid_may_name_several_keys(keys_file: Callable[..., str]) -> None:
    one, two = public("rsa-1", kid=False), public("ec-1", kid=False)
    check = authenticator(jwt_jwks=keys_file(one | {"kid": "a"}, two | {"kid": "a"}))
    assert await check(sign("rsa-1", kid="a"), HERE) is not None
    assert await check(sign("ec-1", "ES256", kid="a"), HERE) is not None


async def test_private_key_in_the_file_is_used_as_public_key(
    keys_file: Callable[..., str],
) -> None:
    key: Any = ECAlgorithm.to_jwk(private("ec-1"), as_dict=True)
    assert "d" in key
    check = authenticator(jwt_jwks=keys_file(key))
    assert await check(sign("ec-1", "ES256", None), HERE) is not None


# What is not.


@pytest.mark.parametrize(
    "payload",
    [
        lambda: without("exp"),
        lambda: without("sub"),
        lambda: without("aud"),
        lambda: claims(exp=int(time.time()) - 60),
        lambda: claims(exp=None),
        lambda: claims(exp=True),
        lambda: claims(exp=str(int(time.time()) + 60)),
        lambda: claims(exp="soon"),
        lambda: claims(exp=[1]),
        lambda: claims(exp=10**400),
        lambda: claims(exp=float("inf")),
        lambda: claims(exp=float("nan")),
        lambda: claims(nbf=int(time.time()) + 60),
        lambda: claims(nbf="0"),
        lambda: claims(nbf=None),
        lambda: claims(iat=int(time.time()) + 60),
        lambda: claims(iat="0"),
        lambda: claims(aud="other"),
        lambda: claims(aud=["other", "chatter"]),
        lambda: claims(aud={"chat": 1}),
        lambda: claims(sub=""),
        lambda: claims(sub="a" * 257),
        lambda: claims(sub=7),
        lambda: claims(sub=None),
        lambda: claims(sub=["ada"]),
        lambda: claims(sub="ada\nERROR"),
        lambda: claims(sub="ada\0"),
        lambda: claims(sub="\ud800"),
        lambda: ["sub", "ada"],
        lambda: "ada",
        lambda: b"\xff\xfe",
        lambda: b"[" * 5000,
        lambda: b'{"exp": ' + b"9" * 5000 + b"}",
    ],
)
async def test_invalid_claims_are_refused(payload: Callable[[], Any]) -> None:
    header = {"alg": "HS256"}
    assert await with_secret()(forged(header, claims(), SECRET.encode()), HERE) is not None
    assert await with_secret()(forged(header, payload(), SECRET.encode()), HERE) is None


async def test_name_of_maximum_length_is_accepted() -> None:
    assert await with_secret()(secretly(claims(sub="é" * 256)), HERE) is not None


async def test_clocks_may_differ_by_ten_seconds() -> None:
    now = int(time.time())
    check = with_secret()
    assert await check(secretly(claims(exp=now - 5)), HERE) == Principal("ada", now + 5)
    assert await check(secretly(claims(nbf=now + 5, iat=now + 5)), HERE) is not None
    for payload in (claims(exp=now - 15), claims(nbf=now + 15), claims(iat=now + 15)):
        assert await check(secretly(payload), HERE) is None


async def test_issuer_must_match_if_set() -> None:
    check = with_secret(jwt_issuer="https://issuer.example")
    assert await check(secretly(claims(iss="https://issuer.example")), HERE) is not None
    for other in ("https://issuer.example/", "issuer", "", None, ["https://issuer.example"]):
        assert (
            await check(forged({"alg": "HS256"}, claims(iss=other), SECRET.encode()), HERE) is None
        )
    assert await check(secretly(), HERE) is None


async def test_token_with_audience_is_refused_without_jwt_audience() -> None:
    check = with_secret(jwt_audience="")
    assert await check(secretly(without("aud")), HERE) is not None
    assert await check(secretly(), HERE) is None


async def test_jwt_claim_chooses_the_name() -> None:
    check = with_secret(jwt_claim="user_id")
    principal = await check(secretly(claims(user_id="bob")), HERE)
    assert principal is not None
    assert principal.name == "bob"
    assert await check(secretly(), HERE) is None


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": ""},
        {"alg": None},
        {"alg": ["HS256"]},
        {"alg": {"HS256": 1}},
        {"alg": "HS512"},
        {"alg": "RS256"},
        {},
        [],
        b"HS256",
        b"[" * 5000,
        {"alg": "HS256", "crit": ["exp"]},
        {"alg": "HS256", "crit": ["b64"], "b64": True},
        {"alg": "HS256", "crit": []},
        {"alg": "HS256", "b64": False},
        {"alg": "HS256", "kid": 7},
        {"alg": "HS256", "kid": None},
    ],
    ids=lambda header: str(header)[:40],
)
async def test_header_does_not_choose_the_algorithm(header: Any) -> None:
    token = forged(header, claims(), SECRET.encode())
    assert await with_secret()(token, HERE) is None
    assert await with_secret()(token.rpartition(".")[0] + ".", HERE) is None


@pytest.mark.parametrize("name", ["rsa-1", "ec-1", "ed-1"])
@pytest.mark.parametrize("kid", [True, False])
async def test_token_signed_with_the_public_key_as_secret_is_refused(
    name: str, kid: bool, keys_file: Callable[..., str]
) -> None:
    check = authenticator(jwt_jwks=keys_file(name))
    key = private(name).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for algorithm in ("HS256", "RS256", "ES256", "EdDSA", "none"):
        header = {"alg": algorithm} | ({"kid": name} if kid else {})
        for secret in (pem, pem.strip(), der, key_set(name), json.dumps(public(name)).encode()):
            assert await check(forged(header, claims(), secret), HERE) is None
        assert await check(forged(header, claims()), HERE) is None


async def test_key_in_the_token_is_not_used(keys_file: Callable[..., str]) -> None:
    check = authenticator(jwt_jwks=keys_file("rsa-1"))
    for kid in ("rsa-1", None):
        assert await check(sign("rsa-9", kid=kid, jwk=public("rsa-9")), HERE) is None
        assert await check(sign("rsa-9", kid=kid, jku="https://evil.example/keys"), HERE) is None


async def test_changed_token_is_refused() -> None:
    header, payload, signature = secretly().split(".")
    other = secretly(claims(sub="eve")).split(".")
    assert await with_secret()(f"{header}.{other[1]}.{signature}", HERE) is None
    assert await with_secret()(f"{other[0]}.{payload}.{other[2]}", HERE) is None
    assert await with_secret()(f"{header}.{payload}.{signature[:-2]}", HERE) is None


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c",
        "é.é.é",
        "\ud800..",
        "a.b.c.d.e",
        " ",
        "null",
        "{}",
        "a" * 9000,
    ],
)
async def test_malformed_token_is_refused(token: str) -> None:
    assert await with_secret()(token, HERE) is None


async def test_token_over_the_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    long = secretly(claims(more="x" * 6500))
    assert len(long) > 8192
    short = secretly(claims(more="x" * 5000))
    assert await with_secret()(short, HERE) is not None
    monkeypatch.setattr(jwt, "get_unverified_header", None)
    assert await with_secret()(long, HERE) is None


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS512"])
async def test_other_algorithms_are_refused(algorithm: str, keys_file: Callable[..., str]) -> None:
    check = authenticator(jwt_jwks=keys_file("rsa-1"))
    assert await check(sign("rsa-1", algorithm), HERE) is None


async def test_alg_of_a_key_allows_only_this_algorithm(
    keys_file: Callable[..., str],
) -> None:
    check = authenticator(jwt_jwks=keys_file(public("rsa-1", alg="RS256")))
    assert await check(sign("rsa-1", "RS256"), HERE) is not None
    assert await check(sign("rsa-1", "PS256"), HERE) is None


async def test_refused_token_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "wsserver")
    check = with_secret()
    tokens = [secretly(claims(exp=1, sub="lovelace")), "secret.token.here", "a.b"]
    for token in tokens:
        assert await check(token, HERE) is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"] * 3
    assert "ExpiredSignatureError" in caplog.text
    for token in (*tokens, "lovelace", SECRET):
        assert token not in caplog.text


# The settings.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"jwt_secret": SECRET, "jwt_jwks": "keys.json"}, "not both"),
        ({"jwt_secret": SECRET[:-1]}, "jwt_secret: must have at least 32 bytes"),
        ({"jwt_jwks": "/no/such/file"}, "jwt_jwks: /no/such/file: No such file"),
        ({"jwt_jwks": "/"}, "jwt_jwks: /: Is a directory"),
        ({"jwt_jwks": "a\0b"}, "embedded null byte"),
        ({"jwt_jwks": "~nobody-of-this-name/keys"}, "jwt_jwks: "),
        ({"jwt_jwks": "https://i.example/k", "jwt_audience": ""}, "needs jwt_audience"),
        ({"jwt_jwks": "http://i.example/k"}, "must be https://"),
        ({"jwt_jwks": "http://10.0.0.1/k"}, "must be https://"),
        ({"jwt_jwks": "http://localhost.example/k"}, "must be https://"),
        ({"jwt_jwks": "ftp://localhost/k"}, "must be https://"),
        ({"jwt_jwks": "file:///etc/keys"}, "needs a host"),
        ({"jwt_jwks": "https://user:pass@i.example/k"}, "no user"),
        ({"jwt_jwks": "https://"}, "needs a host"),
        ({"jwt_jwks": "https://i.example:port/k"}, "not an address"),
    ],
)
def test_invalid_settings_are_a_one_line_error(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        authenticator(**settings)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    for secret in (SECRET[:-1], "pass@"):
        assert secret not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://issuer.example/keys",
        "http://localhost/keys",
        "http://127.8.9.10:80/",
        "http://[::1]:8080/keys",
    ],
)
async def test_allowed_addresses(url: str) -> None:
    async with fetching(url):
        pass


def test_public_key_as_secret_is_refused() -> None:
    key = private("rsa-1").public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(ConfigError, match=r"^jwt_secret: that is a key of another kind") as raised:
        authenticator(jwt_secret=pem)
    assert "BEGIN" not in str(raised.value)


def test_secret_is_in_no_repr_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WSSERVER_JWT_SECRET", SECRET)
    settings = Settings.load()
    check = JwtAuthenticator(settings)
    for shown in (repr(settings), str(settings), str(settings.model_dump()), repr(vars(check))):
        assert SECRET not in shown
    assert SECRET not in settings.model_dump_json()
    assert SECRET not in repr(vars(vars(check)["_source"]))
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    with pytest.raises(SystemExit):
        main(["serve", "--prompt-size", "100000"])
    captured = capsys.readouterr()
    assert "--jwt-secret" in captured.out
    assert SECRET not in captured.out + captured.err
    with pytest.raises(ValidationError) as raised:
        Settings(prompt_size=100_000, jwt_secret=SecretStr(SECRET))
    assert SECRET not in str(raised.value)


async def test_reload_reads_the_secret_file_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    check = authenticator(jwt_secret_file=str(file))
    old = secretly()
    new = forged({"alg": "HS256"}, claims(), SECRET[::-1].encode())
    assert await check(old, HERE) is not None
    assert await check(new, HERE) is None
    file.write_text(SECRET[::-1])
    assert await check.reload()
    assert await check(old, HERE) is None
    assert await check(new, HERE) is not None
    file.write_text("short")
    assert not await check.reload()
    assert await check(new, HERE) is not None
    assert "at least 32 bytes" in caplog.text
    with pytest.raises(ConfigError, match="at least 32 bytes"):
        authenticator(jwt_secret_file=str(file))


def test_missing_pyjwt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    monkeypatch.delitem(sys.modules, "wsserver.auth.jwt")
    with pytest.raises(ConfigError, match=r"pip install wsserver\[jwt\]"):
        importlib.import_module("wsserver.auth.jwt")


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
async def test_key_for_another_purpose_is_left_out(key: Any, keys_file: Callable[..., str]) -> None:
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
def test_invalid_key_set_is_a_one_line_error(document: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(document)
    with pytest.raises(ConfigError, match="not a JSON Web Key Set"):
        authenticator(jwt_jwks=str(path))


async def test_reload_reads_the_key_file_and_ignores_an_invalid_one(
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
    assert "keys stay as they were" in caplog.text
    await check.aclose()


# Keys at an address.


async def test_keys_are_fetched_at_first_use_and_when_old(issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url) as check:
        assert issuer.paths == []
        for _ in range(2):
            assert await check(sign("rsa-1"), HERE) is not None
            assert issuer.paths == ["/keys"]
        clock.now += 3599
        issuer.body = key_set("rsa-2")
        assert await check(sign("rsa-1"), HERE) is not None
        clock.now += 1
        assert await check(sign("rsa-1"), HERE) is not None  # which has it fetched
        await fetched(check)
        assert await check(sign("rsa-1"), HERE) is None
        assert await check(sign("rsa-2"), HERE) is not None
        assert len(issuer.paths) == 2


async def test_key_withdrawn_during_a_pause_is_refused(issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        issuer.body = key_set("rsa-2")
        clock.now += 7200
        assert await check(sign("rsa-1"), HERE) is None


async def test_hanging_issuer_does_not_delay_known_keys(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT", 3600.0)
    monkeypatch.setattr("wsserver.auth.jwt.PATIENCE", 0.05)
    async with fetching(issuer.url) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        issuer.open.clear()
        for _ in range(3):
            clock.now += 3600
            known = check(sign("rsa-1"), HERE)
            # Driven by hand: to wait for anything would need the event loop.
            with pytest.raises(StopIteration) as returned:
                known.send(None)
            assert returned.value.value.name == "ada"
            await issuer.asked(2)
            with pytest.raises(Unavailable):  # but only for so long
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
            assert caplog.text.count("keys stay as they were") == times
        assert await check(sign("rsa-1"), HERE) is not None


async def test_unknown_keys_at_a_hanging_issuer_do_not_delay_known_logins(
    issuer: Issuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with wsserver.serve(
        "demo", port=0, jwt_jwks=issuer.url, jwt_audience="chat", open_timeout=1
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
    async with fetching(issuer.url) as check:
        assert await check(sign("rsa-1", kid=kid), HERE) is not None
        issuer.body = key_set("rsa-1", "rsa-2")
        clock.now += 30
        assert await check(sign("rsa-2", kid=kid), HERE) is not None
        assert await check(sign("rsa-1", kid=kid), HERE) is not None
        assert len(issuer.paths) == 2


async def test_made_up_tokens_cause_few_fetches(issuer: Issuer, clock: Clock) -> None:
    async with fetching(issuer.url) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        for second in range(1, 62):
            clock.now += 1
            assert await check(sign("rsa-9", kid=f"made-up-{second}"), HERE) is None
            assert await check(sign("rsa-9", kid=None), HERE) is None
        assert len(issuer.paths) == 3
        clock.now += 30
        for token in (
            sign("rsa-9", kid="rsa-1"),  # a known name
            forged({"alg": "none", "kid": "x"}, claims()),
            forged({"alg": "HS256", "kid": "x"}, claims(), b"x"),
            sign("ec-1", "ES256", kid="rsa-1"),
            sign("rsa-1", payload=claims(exp=1)),
        ):
            assert await check(token, HERE) is None
        assert len(issuer.paths) == 3


async def test_concurrent_logins_share_a_fetch_and_survive_a_cancellation(issuer: Issuer) -> None:
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


async def test_known_key_does_not_wait_for_the_fetch_of_another(
    issuer: Issuer, clock: Clock
) -> None:
    async with fetching(issuer.url) as check:
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
async def test_without_keys_authentication_is_unavailable_until_a_fetch_works(
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
    async with fetching(issuer.url) as check:
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
    async with fetching(issuer.url) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        spoil(issuer)
        for _ in range(2):
            clock.now += 3600
            for _ in range(2):
                assert await check(sign("rsa-1"), HERE) is not None
                with pytest.raises(Unavailable):  # it may be signed by a newer key
                    await check(sign("rsa-2"), HERE)
        assert len(issuer.paths) == 3
        assert len(caplog.records) == 1  # for all of the outage
        assert says in caplog.text
        assert "keys stay as they were" in caplog.text


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
    async with fetching(issuer.url) as check:
        assert await check(sign("rsa-1"), HERE) is not None
        issuer.body = key_set("rsa-2")
        await check.reload()
        assert await check(sign("rsa-1"), HERE) is None
        assert len(issuer.paths) == 2


async def test_aclose_cancels_a_running_fetch(issuer: Issuer) -> None:
    issuer.open.clear()
    async with fetching(issuer.url) as check:
        waiting = asyncio.create_task(check(sign("rsa-1"), HERE))
        await issuer.asked(1)
    with pytest.raises(Unavailable):
        await waiting
