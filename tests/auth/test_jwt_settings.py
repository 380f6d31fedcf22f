"""The settings of JSON Web Tokens."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr, ValidationError

from tests.auth.issuer import (
    HERE,
    SECRET,
    authenticator,
    claims,
    fetching,
    forged,
    private,
    secretly,
)
from wsserver import ConfigError, Settings
from wsserver.auth.jwt import JwtAuthenticator
from wsserver.cli import main


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
def test_invalid_jwt_settings_are_one_line_error(settings: dict[str, Any], says: str) -> None:
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
async def test_https_and_loopback_addresses_are_allowed(url: str) -> None:
    async with fetching(url):
        pass


def test_public_key_as_secret_is_refused() -> None:
    key = private("rsa-1").public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(ConfigError, match=r"^jwt_secret: this is a public key") as raised:
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
    parts = [vars(part) for part in vars(check).values() if hasattr(part, "__dict__")]
    assert "Key(" in repr(parts)
    assert SECRET not in repr(parts)
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


async def test_reload_reads_secret_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_missing_pyjwt_error_names_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    monkeypatch.delitem(sys.modules, "wsserver.auth.jwt")
    with pytest.raises(ConfigError, match=r"pip install 'PyJWT\[crypto\]'"):
        importlib.import_module("wsserver.auth.jwt")
