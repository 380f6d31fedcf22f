"""Which JSON Web Tokens are accepted."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm

from tests.auth.issuer import (
    HERE,
    SECRET,
    authenticator,
    claims,
    forged,
    key_set,
    private,
    public,
    secretly,
    sign,
    with_secret,
    without,
)
from wsserver.auth.base import Principal

# Accepted tokens.


async def test_valid_token_gives_principal_and_expiry() -> None:
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
async def test_key_of_each_type_verifies_with_and_without_kid(
    key: str, algorithm: str, kid: str | None, keys_file: Callable[..., str]
) -> None:
    check = authenticator(jwt_jwks=keys_file("rsa-2", "ec-2", "rsa-1", "ec-1", "ed-1"))
    assert await check(sign(key, algorithm, kid), HERE) is not None
    assert await check(sign(key, algorithm, kid="rsa-2"), HERE) is None
    assert await check(sign(f"{key}0", algorithm, kid), HERE) is None


async def test_several_keys_may_share_one_kid(keys_file: Callable[..., str]) -> None:
    one, two = public("rsa-1", kid=False), public("ec-1", kid=False)
    check = authenticator(jwt_jwks=keys_file(one | {"kid": "a"}, two | {"kid": "a"}))
    assert await check(sign("rsa-1", kid="a"), HERE) is not None
    assert await check(sign("ec-1", "ES256", kid="a"), HERE) is not None


async def test_private_key_in_file_is_used_as_public_key(
    keys_file: Callable[..., str],
) -> None:
    key: Any = ECAlgorithm.to_jwk(private("ec-1"), as_dict=True)
    assert "d" in key
    check = authenticator(jwt_jwks=keys_file(key))
    assert await check(sign("ec-1", "ES256", None), HERE) is not None


# Refused tokens.


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


async def test_ten_seconds_of_clock_difference_are_accepted() -> None:
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


async def test_jwt_claim_setting_chooses_name() -> None:
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
async def test_token_header_does_not_choose_algorithm(header: Any) -> None:
    token = forged(header, claims(), SECRET.encode())
    assert await with_secret()(token, HERE) is None
    assert await with_secret()(token.rpartition(".")[0] + ".", HERE) is None


@pytest.mark.parametrize("name", ["rsa-1", "ec-1", "ed-1"])
@pytest.mark.parametrize("kid", [True, False])
async def test_token_signed_with_public_key_as_secret_is_refused(
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


async def test_key_in_token_is_not_used(keys_file: Callable[..., str]) -> None:
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


async def test_token_over_size_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_alg_of_key_restricts_algorithm(
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
