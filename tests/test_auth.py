"""Who a client says that it is: tokens, the first frame, their end, and what they own."""

import asyncio
import contextlib
import hashlib
import json
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.support.client import Client, client
from tests.support.process import run
from tests.support.puppet import BOUND, Puppet, until
from wsserver import ConfigError, Handshake, Principal, Unavailable
from wsserver.auth import close, make, reload, tokens
from wsserver.auth.tokens import Tokens

HERE = Handshake("127.0.0.1", "/", {})
ID = "0123456789abcdef"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


# Tokens.


async def test_new_token_authenticates_its_principal_only(
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


async def test_principal_may_have_several_tokens() -> None:
    check = Tokens(f"ada sha256:{digest('one')}, ada sha256:{digest('two')}")
    assert await check("one", HERE) == await check("two", HERE) == Principal("ada")


async def test_file_may_have_comments_blank_lines_and_no_last_line_end(tmp_path: Path) -> None:
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
def test_error_about_an_invalid_line_does_not_quote_it(
    line: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "t").write_text(line)
    with pytest.raises(ConfigError, match=says) as raised:
        Tokens(path=tmp_path / "t")
    assert "wss_secret" not in str(raised.value)
    with pytest.raises(ConfigError, match=says):
        Tokens(line)


@pytest.mark.parametrize("name", ["", "a b", "a,b", "#a", "a#b", "a\n", "a\x1b[2J", "x" * 257])
def test_name_that_does_not_fit_a_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a token's name"):
        tokens.new(name)


def test_too_many_days_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be 'anonymous'"):
        tokens.new("anonymous")


def test_unreadable_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token_file: cannot read .*: No such file"):
        Tokens(path=tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"token_file: cannot read .*: the file is not text"):
        Tokens(path=tmp_path / "binary")
    with pytest.raises(ConfigError, match=r"cannot write .*: No such file"):
        tokens.add(tmp_path / "none" / "t", "x")


async def test_reload_of_an_invalid_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"ada sha256:{digest('one')}")
    check = Tokens(path=path)
    path.write_text("nonsense")
    assert not await check.reload()
    assert "tokens not read again" in caplog.text
    assert await check("one", HERE) == Principal("ada")
    path.write_text(f"bob sha256:{digest('two')}")
    assert await check.reload()
    assert await check("one", HERE) is None
    assert await check("two", HERE) == Principal("bob")


async def test_both_kinds_of_tokens_work_together() -> None:
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


def test_no_settings_make_no_authenticator() -> None:
    assert make(wsserver.Settings.load()) is None


# The command line.


async def test_command_line_makes_tokens(tmp_path: Path) -> None:
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


# Sockets.


@contextlib.asynccontextmanager
async def serving(puppet: Puppet, **given: Any) -> AsyncIterator[wsserver.Server]:
    lines = f"ada sha256:{digest('ada-token')}, bob sha256:{digest('bob-token')}"
    options: dict[str, Any] = {"port": 0, "tokens": lines, "drain_timeout": 0} | given
    async with wsserver.serve(puppet, **options) as server:
        yield server


@contextlib.asynccontextmanager
async def entered(server: wsserver.Server, token: str) -> AsyncIterator[Client]:
    async with client(server) as chat:
        await chat.send({"type": "auth", "token": token})
        await chat.next("authenticated")
        yield chat


async def test_token_in_the_handshake_authenticates(puppet: Puppet) -> None:
    async with serving(puppet) as server:
        async with client(server, additional_headers={"Authorization": "Bearer ada-token"}) as chat:
            assert (await chat.prompt())["type"] == "start"
        with pytest.raises(InvalidStatus) as raised:
            async with connect(
                server.url, proxy=None, additional_headers={"Authorization": "Bearer x"}
            ):
                raise AssertionError
        assert raised.value.response.status_code == 401


async def test_token_in_the_first_frame_authenticates(puppet: Puppet) -> None:
    async with serving(puppet) as server, client(server) as chat:
        await chat.send({"type": "auth", "token": "ada-token"})
        assert await chat.receive() == {"type": "authenticated", "principal": "ada"}
        assert (await chat.prompt())["type"] == "start"


async def test_frames_right_after_auth_wait_for_its_answer(puppet: Puppet) -> None:
    asked: asyncio.Queue[str | None] = asyncio.Queue()
    answer = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        asked.put_nowait(token)
        await answer.wait()
        return Principal(token)

    async with wsserver.serve(puppet, authenticate=slow, port=0, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "ada"})
            await chat.send({"prompt": "One", "id": ID})
            await chat.send({"type": "list"})
            await asyncio.wait_for(asked.get(), BOUND)
            assert await chat.quiet() == []
            answer.set()
            types = [(await chat.receive())["type"] for _ in range(3)]
            assert types == ["authenticated", "start", "conversations"]


async def test_stop_right_after_auth_does_not_wait(puppet: Puppet) -> None:
    answer = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        await answer.wait()
        return Principal(token)

    async with wsserver.serve(puppet, authenticate=slow, port=0, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "ada"})
            await chat.send({"prompt": "One", "id": ID})
            await chat.send({"type": "stop"})
            await chat.quiet()
            answer.set()
            assert (await chat.text(ID))[1]["reason"] == "stopped"


@pytest.mark.parametrize(
    "frame",
    [
        {"prompt": "Hello"},
        {"type": "resume", "id": ID},
        {"type": "open", "conversation": ID},
        {"type": "list"},
        {"type": "rename", "conversation": ID, "title": "x"},
        {"type": "delete", "conversation": ID},
    ],
)
async def test_frames_before_auth_are_refused(puppet: Puppet, frame: dict[str, Any]) -> None:
    async with serving(puppet) as server, client(server) as chat:
        await chat.send(frame)
        error = await chat.next("error")
        assert (error["code"], error["retryable"]) == ("unauthenticated", False)
        assert '"auth"' in error["message"]
        await chat.send({"type": "stop", "id": ID})
        assert (await chat.next("error"))["code"] == "unauthenticated"
        assert puppet.replies == []
        await chat.send({"type": "auth", "token": "ada-token"})
        await chat.next("authenticated")


@pytest.mark.parametrize("token", ["bad", "ada-token ", "x" * 8192])
async def test_invalid_token_closes_the_socket(puppet: Puppet, token: str) -> None:
    async with serving(puppet) as server, client(server) as chat:
        await chat.send({"type": "auth", "token": token})
        await chat.send({"prompt": "Hello"})
        assert (await chat.next())["code"] == "unauthenticated"
        closed = await chat.closed()
        assert closed.rcvd is not None
        assert (closed.rcvd.code, closed.rcvd.reason) == (1008, "unauthenticated")
        assert len(chat.frames) == 1
        assert token not in json.dumps(chat.frames)
        assert puppet.replies == []


async def test_socket_without_auth_is_closed_after_auth_timeout(puppet: Puppet) -> None:
    async with serving(puppet, auth_timeout=0.05) as server:
        async with client(server) as chat, entered(server, "ada-token") as other:
            closed = await chat.closed()
            assert closed.rcvd is not None
            assert closed.rcvd.code == 1008
            assert chat.frames[-1]["code"] == "unauthenticated"
            await other.quiet()


async def test_expired_token_closes_the_socket_unless_renewed(
    puppet: Puppet,
) -> None:
    async def until_then(token: str | None, _: Handshake) -> Principal | None:
        name, seconds = (token or "x 0").split()
        return Principal(name, time.time() + float(seconds)) if float(seconds) else None

    async with (
        wsserver.serve(puppet, authenticate=until_then, port=0, drain_timeout=0) as server,
        entered(server, "ada 1") as short,
        entered(server, "ada 1") as renewed,
    ):
        await renewed.send({"type": "auth", "token": "ada 1000"})
        answer = await renewed.next("authenticated")
        assert answer["expires"] > time.time() + 900
        start = await short.prompt()
        closed = await short.closed()
        assert closed.rcvd is not None
        assert (closed.rcvd.code, closed.rcvd.reason) == (1008, "unauthenticated")
        assert short.frames[-1]["code"] == "unauthenticated"
        await renewed.send({"type": "resume", "id": start["id"]})
        assert (await renewed.next("start"))["id"] == start["id"]


async def test_socket_cannot_change_its_principal(puppet: Puppet) -> None:
    async with serving(puppet) as server, entered(server, "ada-token") as chat:
        for token in ("bob-token", "nonsense"):
            await chat.send({"type": "auth", "token": token})
            assert (await chat.next("error"))["code"] == "unauthenticated"
        await chat.send({"type": "auth", "token": "ada-token"})
        assert (await chat.next("authenticated"))["principal"] == "ada"


async def test_server_without_authenticator_accepts_any_auth_frame(
    server: wsserver.Server, chat: Client
) -> None:
    await chat.send({"type": "auth", "token": "whatever"})
    assert await chat.receive() == {"type": "authenticated", "principal": "anonymous"}


async def test_no_principal_can_be_named_anonymous(puppet: Puppet) -> None:
    async with serving(puppet, tokens=f"anonymous sha256:{digest('x')}") as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "x"})
            assert (await chat.next())["code"] == "unauthenticated"


@pytest.mark.parametrize("failure", [Unavailable(), ValueError("secret")])
async def test_unavailable_authenticator_is_a_retryable_error(
    puppet: Puppet, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        raise failure

    async with wsserver.serve(puppet, authenticate=failing, port=0) as server:
        with pytest.raises(InvalidStatus) as raised:
            async with client(server, additional_headers={"Authorization": "Bearer x"}):
                raise AssertionError
        assert raised.value.response.status_code == 503
        assert int(raised.value.response.headers["Retry-After"]) > 0
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "x"})
            error = await chat.next("error")
            assert (error["code"], error["retryable"]) == ("auth_unavailable", True)
            assert (await chat.closed()).rcvd.code == 1013  # type: ignore[union-attr]
    assert "secret" not in caplog.text


async def test_disconnect_during_authentication_leaves_nothing(puppet: Puppet) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    answered = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        asked.set()
        await answer.wait()
        answered.set()
        return Principal("ada")

    async with wsserver.serve(puppet, authenticate=slow, port=0, open_timeout=30) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        await asyncio.wait_for(asked.wait(), BOUND)
        writer.transport.abort()
        await until(lambda: not server._endpoint.connections)
        answer.set()
        await asyncio.wait_for(answered.wait(), BOUND)
        await until(lambda: not server._endpoint.answering)
        await asyncio.sleep(0)
        assert len(server._admission.principals) == 0
        assert server._admission._open == 0
    del reader


async def test_custom_authenticator_gets_the_handshake(puppet: Puppet) -> None:
    seen: list[Handshake] = []

    async def by_cookie(token: str | None, handshake: Handshake) -> Principal | None:
        seen.append(handshake)
        return Principal(handshake.headers.get("cookie", "").removeprefix("session="))

    async with wsserver.serve(puppet, authenticate=by_cookie, port=0, drain_timeout=0) as server:
        async with connect(
            server.url + "ws?room=7", proxy=None, additional_headers={"Cookie": "session=ada"}
        ) as socket:
            chat = Client(socket)
            assert (await chat.prompt())["type"] == "start"
            assert {generation.owner for generation in server._hub.retention} == {"ada"}
    assert seen[0].address == "127.0.0.1"
    assert seen[0].path == "/ws?room=7"


@pytest.mark.parametrize(
    "answer",
    [lambda: "ada", lambda: Principal(42), lambda: Principal("")],  # type: ignore[arg-type]
)
async def test_result_that_is_no_principal_is_logged(
    puppet: Puppet, answer: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def wrong(token: str | None, _: Handshake) -> Any:
        return answer()

    async with wsserver.serve(puppet, authenticate=wrong, port=0) as server:
        with pytest.raises(InvalidStatus) as raised:
            async with client(server):
                raise AssertionError
        assert raised.value.response.status_code == 503
    assert "the authenticator failed failure=TypeError" in caplog.text


async def test_principal_that_expired_at_the_epoch_is_expired(puppet: Puppet) -> None:
    async def ended(token: str | None, _: Handshake) -> Principal | None:
        return Principal("ada", expires=0)

    async with wsserver.serve(puppet, authenticate=ended, port=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "x"})
            assert (await chat.next())["code"] == "unauthenticated"


@pytest.mark.parametrize("hangs", [True, False])
async def test_failing_aclose_does_not_block_shutdown(puppet: Puppet, *, hangs: bool) -> None:
    class Stubborn:
        async def __call__(self, token: str | None, _: Handshake, /) -> Principal | None:
            return None

        async def aclose(self) -> None:
            if hangs:
                await asyncio.Event().wait()
            raise RuntimeError

    async with asyncio.timeout(BOUND):
        async with wsserver.serve(puppet, authenticate=Stubborn(), port=0, stop_timeout=0.05):
            pass


# What a principal owns.


async def test_data_of_one_principal_is_not_found_for_another(puppet: Puppet) -> None:
    async with (
        serving(puppet) as server,
        entered(server, "ada-token") as ada,
        entered(server, "bob-token") as bob,
    ):
        start = await ada.prompt("Mine", id=ID)
        name = start["conversation"]
        (await puppet.reply()).say("secret")
        await ada.next("token")
        for frame in (
            {"type": "resume", "id": ID},
            {"type": "open", "conversation": name},
            {"type": "rename", "conversation": name, "title": "x"},
            {"type": "delete", "conversation": name},
        ):
            await bob.send(frame)
            foreign = await bob.next("error")
            absent = {k: "x" * len(v) if v in {ID, name} else v for k, v in frame.items()}
            await bob.send(absent)
            other = await bob.next("error")
            assert foreign["code"] == other["code"] == "not_found"
            assert foreign["message"] == other["message"]
        for frame in ({"type": "stop", "id": ID}, {"type": "stop"}):
            await bob.send(frame)
            assert (await bob.next("error"))["code"] == "not_running"
        # The same names are free for somebody else.
        theirs = await bob.prompt("Theirs", id=ID, conversation=name)
        assert theirs["type"] == "start"
        (await puppet.reply(1)).say("fine").end()
        assert (await bob.text(ID))[0] == "fine"
        await bob.send({"type": "list"})
        assert [item["title"] for item in (await bob.next("conversations"))["items"]] == ["Theirs"]
        await bob.send({"type": "delete", "conversation": name})
        await bob.next("deleted")
        (await puppet.reply(0)).say(" indeed").end()
        assert (await ada.text(ID))[0] == "secret indeed"
        assert "secret" not in json.dumps(bob.frames)


async def test_sockets_of_one_principal_share_conversations(puppet: Puppet) -> None:
    async with (
        serving(puppet) as server,
        entered(server, "ada-token") as one,
        entered(server, "ada-token") as two,
    ):
        start = await one.prompt(id=ID)
        await two.send({"type": "open", "conversation": start["conversation"]})
        assert (await two.next("start"))["id"] == ID
        await two.send({"type": "stop"})
        assert (await one.text(ID))[1]["by"] == "client"


# Reloading.


async def test_reload_closes_only_sockets_of_removed_tokens(puppet: Puppet, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    ada, bob = (f"{name} sha256:{digest(name + '-token')}\n" for name in ("ada", "bob"))
    path.write_text(ada + bob)
    async with (
        serving(puppet, tokens="", token_file=str(path)) as server,
        entered(server, "ada-token") as stays,
        entered(server, "bob-token") as goes,
        client(server) as undecided,
    ):
        start = await stays.prompt()
        path.write_text(ada + f"carol sha256:{digest('carol-token')}\n")
        assert await server.reload()
        closed = await goes.closed()
        assert closed.rcvd is not None
        assert (closed.rcvd.code, goes.frames[-1]["code"]) == (1008, "unauthenticated")
        (await puppet.reply()).say("on and on").end()
        assert (await stays.text(start["id"]))[0] == "on and on"
        await undecided.send({"type": "auth", "token": "carol-token"})
        assert (await undecided.next("authenticated"))["principal"] == "carol"
        path.write_text("broken")
        assert not await server.reload()
        await stays.quiet()
        assert len(server._connections) == 2
        await until(lambda: len(server._endpoint.connections) == 2)


async def test_reload_can_shorten_a_token(puppet: Puppet) -> None:
    seconds: list[float | None] = [None]

    async def lasting(token: str | None, _: Handshake) -> Principal | None:
        ends = None if seconds[0] is None else time.time() + seconds[0]
        return None if token is None else Principal(token, ends)

    async with (
        wsserver.serve(puppet, authenticate=lasting, port=0) as server,
        entered(server, "ada") as chat,
        client(server) as undecided,
    ):
        seconds[0] = 0.05
        assert await server.reload()
        assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]
        assert "expired" in chat.frames[-1]["message"]
        await undecided.quiet()


async def test_authentication_during_a_reload_is_repeated(puppet: Puppet) -> None:
    good = {"ada"}
    asked: asyncio.Queue[str] = asyncio.Queue()
    answer = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        found = Principal(token) if token in good else None
        asked.put_nowait(token)
        await answer.wait()
        return found

    async with wsserver.serve(puppet, authenticate=slow, port=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "ada"})
            headers = {"Authorization": "Bearer ada"}
            shaking = asyncio.create_task(
                connect(server.url, proxy=None, additional_headers=headers).__aenter__()
            )
            for _ in range(2):
                await asyncio.wait_for(asked.get(), BOUND)
            good.clear()
            assert await server.reload()
            answer.set()
            assert (await chat.next())["code"] == "unauthenticated"
            with pytest.raises(InvalidStatus, match="401"):
                await shaking


async def test_token_renewed_during_a_reload_counts(puppet: Puppet) -> None:
    good = {"ada old"}
    asked, answer = asyncio.Event(), asyncio.Event()

    async def by_name(token: str | None, _: Handshake) -> Principal | None:
        if token is None or token not in good:
            if not good:
                asked.set()
                await answer.wait()
            return None
        return Principal(token.split()[0])

    async with wsserver.serve(puppet, authenticate=by_name, port=0) as server:
        async with entered(server, "ada old") as chat:
            good.clear()
            reloading = asyncio.create_task(server.reload())
            await asyncio.wait_for(asked.wait(), BOUND)
            good.add("ada new")
            await chat.send({"type": "auth", "token": "ada new"})
            await chat.next("authenticated")
            answer.set()
            await reloading
            await chat.quiet()


@pytest.mark.parametrize("expires", [0, 0.0, -1.0])
async def test_principal_that_expired_long_ago_is_refused(puppet: Puppet, expires: float) -> None:
    async def ended(_: str | None, __: Handshake) -> Principal | None:
        return Principal("ada", expires)

    async with wsserver.serve(puppet, authenticate=ended, port=0) as server:
        with pytest.raises(InvalidStatus, match="401"):
            async with client(server, additional_headers={"Authorization": "Bearer x"}):
                raise AssertionError


async def test_replies_of_a_principal_stop_when_its_token_is_removed(
    puppet: Puppet, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"ada sha256:{digest('one')}\nada sha256:{digest('two')}\n")
    async with (
        serving(puppet, tokens="", token_file=str(path)) as server,
        entered(server, "one") as goes,
        entered(server, "two") as stays,
    ):
        await goes.prompt("Alone", conversation="conversation-one")
        both = await goes.prompt("Both", conversation="conversation-two")
        await stays.send({"type": "resume", "id": both["id"]})
        await stays.next("start")
        alone, other = [await puppet.reply(number) for number in range(2)]
        path.write_text(f"ada sha256:{digest('two')}\n")
        await server.reload()
        await asyncio.wait_for(alone.closed.wait(), BOUND)
        other.say("x").end()
        assert (await stays.text(both["id"]))[0] == "x"


async def test_hanging_check_on_reload_delays_no_other_socket(puppet: Puppet) -> None:
    hanging = False

    async def some(token: str | None, _: Handshake) -> Principal | None:
        if hanging and token == "slow":
            await asyncio.Event().wait()
        return Principal(token) if token and not (hanging and token == "gone") else None

    async with (
        wsserver.serve(puppet, authenticate=some, port=0, open_timeout=1) as server,
        entered(server, "slow") as slow,
        entered(server, "gone") as gone,
    ):
        hanging = True
        reloading = asyncio.create_task(server.reload())
        assert (await gone.closed()).rcvd.code == 1008  # type: ignore[union-attr]
        async with asyncio.timeout(BOUND):
            await reloading
        await slow.quiet()


async def test_anonymous_clients_are_limited_by_address(puppet: Puppet) -> None:
    async def guests(_: str | None, __: Handshake) -> Principal | None:
        return wsserver.ANONYMOUS

    async with wsserver.serve(
        puppet, authenticate=guests, port=0, connections_per_principal=1
    ) as server:
        async with client(server) as one, client(server) as two:
            await one.quiet()
            await two.quiet()


async def test_unavailable_authenticator_on_reload_closes_no_socket(puppet: Puppet) -> None:
    down = False

    async def shaky(token: str | None, _: Handshake) -> Principal | None:
        if down:
            raise Unavailable
        return None if token is None else Principal(token)

    async with wsserver.serve(puppet, authenticate=shaky, port=0) as server:
        async with entered(server, "ada") as chat:
            down = True
            assert await server.reload()
            await chat.quiet()
