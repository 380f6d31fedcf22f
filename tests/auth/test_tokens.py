"""Tokens of the operator."""

import stat
import time
from pathlib import Path

import pytest

import wsserver
from tests.auth.login import digest
from tests.support.process import run
from wsserver import ConfigError, Handshake, Principal
from wsserver.auth import close, make, reload, tokens
from wsserver.auth.tokens import Tokens

HERE = Handshake("127.0.0.1", "/", {})


async def test_new_token_authenticates_only_named_principal(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tokens"
    made = {}
    for name in ("ada", "grace.hopper@example.com", "名前"):
        made[name], line = tokens.new(name)
        tokens.add(path, line)
    check = Tokens(path=path)
    for name, token in made.items():
        assert await check(token, HERE) == Principal(name)
    for wrong in ("", "wss_", "x" * 10_000, made["ada"][:-1], made["ada"] + "a", "\ud800", None):
        assert await check(wrong, HERE) is None
    text = path.read_text()
    assert all(token not in text and digest(token) in text for token in made.values())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_several_tokens_of_one_principal_work() -> None:
    check = Tokens(f"ada sha256:{digest('one')}, ada sha256:{digest('two')}")
    assert await check("one", HERE) == await check("two", HERE) == Principal("ada")


async def test_file_with_comments_and_blank_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# Ours\n\n  ada   sha256:{digest('one')}  # since May")
    tokens.add(path, f"bob sha256:{digest('two')}")
    check = Tokens(path=path)
    assert await check("one", HERE) == Principal("ada")
    assert await check("two", HERE) == Principal("bob")


async def test_token_expires_after_its_last_day() -> None:
    check = Tokens(f"ada sha256:{digest('old')} 2020-02-29, ada sha256:{digest('new')} 2999-12-31")
    assert await check("old", HERE) is None
    principal = await check("new", HERE)
    assert principal is not None
    assert principal.expires == 32503680000  # midnight, UTC
    token, line = tokens.new("ada", days=0)
    principal = await Tokens(line)(token, HERE)
    assert principal is not None
    assert principal.expires is not None
    assert 0 < principal.expires - time.time() <= 86400


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ada", "entry 1 is not NAME sha256:DIGEST"),
        ("ada wss_secret", "entry 1 is not"),
        (f"ada sha256:{digest('x')[:-1]}", "entry 1 is not"),
        (f"ada sha256:{digest('x')} tomorrow", "entry 1 is not"),
        (f"ada sha256:{digest('x')} 2023-02-29", "entry 1: there is no such day"),
        (f"ok sha256:{digest('x')}\nada {digest('x')}", "entry 2 is not"),
    ],
)
def test_error_about_invalid_line_does_not_quote_line(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(line)
    with pytest.raises(ConfigError, match=says) as raised:
        Tokens(path=tmp_path / "t")
    assert "wss_secret" not in str(raised.value)
    with pytest.raises(ConfigError, match=says):
        Tokens(line)


@pytest.mark.parametrize("name", ["", "a b", "a,b", "#a", "a#b", "a\n", "a\x1b[2J", "x" * 257])
def test_token_name_with_separator_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a token's name"):
        tokens.new(name)


def test_too_many_days_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be 'anonymous'"):
        tokens.new("anonymous")


def test_unreadable_token_file_is_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token_file: cannot read .*: No such file"):
        Tokens(path=tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"token_file: cannot read .*: the file is not text"):
        Tokens(path=tmp_path / "binary")
    with pytest.raises(ConfigError, match=r"cannot write .*: No such file"):
        tokens.add(tmp_path / "none" / "t", "x")


async def test_reload_of_invalid_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"ada sha256:{digest('one')}")
    check = Tokens(path=path)
    path.write_text("nonsense")
    assert not await check.reload()
    assert "tokens not reloaded" in caplog.text
    assert await check("one", HERE) == Principal("ada")
    path.write_text(f"bob sha256:{digest('two')}")
    assert await check.reload()
    assert await check("one", HERE) is None
    assert await check("two", HERE) == Principal("bob")


async def test_configured_tokens_and_jwt_work_together() -> None:
    import jwt

    secret = "x" * 32
    check = make(wsserver.Settings.load(tokens=f"ada sha256:{digest('one')}", jwt_secret=secret))
    assert check is not None
    signed = jwt.encode({"sub": "grace", "exp": time.time() + 60}, secret)
    assert await check("one", HERE) == Principal("ada")
    grace = await check(signed, HERE)
    assert grace is not None
    assert grace.name == "grace"
    assert await check("two", HERE) is None
    assert await reload(check)
    await close(check)


def test_settings_without_tokens_make_no_authenticator() -> None:
    assert make(wsserver.Settings.load()) is None


# The command line.


async def test_token_new_command_makes_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    async with run("-m", "wsserver", "token", "new", "ada", "--file", str(path)) as process:
        made = (await process.line(r"^(wss_\S+)$"))[1]
    async with run("-m", "wsserver", "token", "new", "bob", "--days", "7") as process:
        line = (await process.line(r"^(bob sha256:\S+ \d{4}-\d\d-\d\d)$"))[1]
        other = (await process.line(r"^(wss_\S+)$"))[1]
    check = Tokens(line, path)
    assert await check(made, HERE) == Principal("ada")
    bob = await check(other, HERE)
    assert bob is not None
    assert bob.name == "bob"
