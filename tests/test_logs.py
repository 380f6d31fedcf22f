"""The log: one line per event, and no secrets."""

import asyncio
import contextvars
import io
import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

import wsserver
from tests.support.client import Client, client
from tests.support.process import Process, run
from tests.support.puppet import BOUND, Puppet
from tests.support.upstream import Script, Upstream, error
from wsserver import Code, ModelError, logs
from wsserver.hub.live import Generation
from wsserver.hub.reporting import Reporter
from wsserver.logs import MAX_LINES, NAMES, WINDOW, log, printable, set_up, write_left_out
from wsserver.protocol import Done, Prompt
from wsserver.telemetry import Metrics

NASTY = "a\nb\x1b[31m\x00\r\x85\u2028\u202e\u200bé\ud800 end"
SECRET = "hunter2-planted"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def generations(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        {**record.event, "level": record.levelname}  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "wsserver" and record.event["event"] == "generation"  # type: ignore[attr-defined]
    ]


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def failing(text: str) -> None:
    try:
        raise KeyError(text)
    except KeyError as cause:
        raise ValueError(text) from cause


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_log_event_is_one_line_for_any_value(stream: io.StringIO) -> None:
    set_up("info", stream)
    log.info("generation", id=NASTY, seconds=1.5, missing=None)
    logging.getLogger("other").warning("foreign %s", NASTY)
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert lines[-1] == ""
    assert all(line.isprintable() for line in lines)
    assert "missing" not in stream.getvalue()


def test_invisible_characters_are_escaped() -> None:
    assert printable("grüße ☃ 日本 🙂") == "grüße ☃ 日本 🙂"
    assert printable("\x1b\u202e\u2028\x7f\ud800") == r"\x1b\u202e\u2028\x7f\ud800"


def test_log_to_pipe_is_json_with_timestamp_and_level() -> None:
    stream = io.StringIO()
    set_up("info", stream)
    log.info("generation", id="x", seconds=1.25, code=Code.BUSY)
    log.debug("too small")
    logging.getLogger("asyncio").error("a library's")
    logging.getLogger("httpx2").info("not ours")
    first, second = objects(stream.getvalue())
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "level": "info",
        "event": "generation",
        "id": "x",
        "seconds": 1.25,
        "code": "busy",
    }
    assert (second["level"], second["event"], second["logger"]) == (
        "error",
        "a library's",
        "asyncio",
    )


def test_log_to_terminal_is_readable_text() -> None:
    stream = Terminal()
    set_up("info", stream)
    log.warning("generation", id="x", reason='a "b" c')
    assert stream.getvalue()[8:] == ' warning generation id=x reason="a \\"b\\" c"\n'


@pytest.mark.parametrize("value", ['\\" level=error x="', "a \\", '= \\\\" b', ' "'])
def test_value_ends_at_its_quote_in_text(value: str) -> None:
    stream = Terminal()
    set_up("info", stream)
    log.warning("generation", reason=value, id="x")
    assert len(shlex.split(stream.getvalue())) == 5


def test_second_set_up_replaces_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up("info", first)
    set_up("info", second)
    log.info("once")
    assert first.getvalue() == ""
    assert len(objects(second.getvalue())) == 1


@pytest.mark.parametrize("foreign", [True, False])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_exception_text_is_logged_at_debug_level_only(level: str, foreign: bool) -> None:
    stream = io.StringIO()
    set_up(level, stream)
    try:
        failing(SECRET)
    except ValueError as failure:
        if foreign:
            logging.getLogger("library").exception("it failed: %s", SECRET)
        else:
            log.error("it failed", failure=failure)
    (event,) = objects(stream.getvalue())
    assert event["event"].startswith("it failed")
    assert event["failure"] == "ValueError from KeyError"
    assert "test_logs.py:" in event["where"]
    assert " in failing" in event["where"]
    assert (SECRET in stream.getvalue()) is (level == "debug")
    assert ("Traceback" in event.get("traceback", "")) is (level == "debug")


def test_exception_group_and_cyclic_causes_are_logged() -> None:
    stream = io.StringIO()
    set_up("info", stream)
    one, two = ValueError(SECRET), TypeError(SECRET)
    one.__cause__, two.__cause__ = two, one
    log.error("ring", failure=one)
    log.error("group", failure=ExceptionGroup(SECRET, [KeyError(SECRET)]))
    ring, group = objects(stream.getvalue())
    assert ring["failure"] == "ValueError from TypeError"
    assert group["failure"] == "ExceptionGroup from KeyError"
    assert SECRET not in stream.getvalue()


async def test_unretrieved_task_exception_is_logged_without_text() -> None:
    stream = io.StringIO()
    set_up("info", stream)
    loop = asyncio.get_running_loop()
    task: asyncio.Future[None] = loop.create_future()
    task.set_exception(ValueError(SECRET))
    loop.call_exception_handler(
        {"message": "Task exception was never retrieved", "exception": task.exception()}
        | {"future": task}
    )
    handle = f"Exception in callback failing({SECRET!r})"
    loop.call_exception_handler({"message": handle, "exception": task.exception()})
    first, second = objects(stream.getvalue())
    assert first["event"] == "Task exception was never retrieved"
    assert second["event"] == "Exception in callback failing"
    assert SECRET not in stream.getvalue()


def test_all_lines_of_a_node_have_its_id() -> None:
    stream = io.StringIO()
    set_up("info", stream)

    def work() -> None:
        logs.name_node(lambda: "n1")
        log.info("of the node")
        logging.getLogger("asyncpg").warning("of a library")

    contextvars.copy_context().run(work)
    log.info("of the process")
    assert [line.get("node") for line in objects(stream.getvalue())] == ["n1", "n1", None]


def test_library_records_about_disconnects_are_dropped() -> None:
    stream = io.StringIO()
    set_up("info", stream)
    logging.getLogger("asyncio").warning("socket.send() raised exception.")
    logging.getLogger("asyncio").warning("SSL connection is closed")
    logging.getLogger("websockets.server").warning("skipped broadcast: failed to write message")
    assert stream.getvalue() == ""
    logging.getLogger("websockets.server").error("connection handler failed")
    assert len(objects(stream.getvalue())) == 1


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_lines_over_limit_are_counted_in_window(
    stream: io.StringIO,
) -> None:
    now = 0.0
    set_up("info", stream, lambda: now)
    for _ in range(MAX_LINES + 900):
        log.info("connection refused", why="origin")
    for _ in range(MAX_LINES + 5):
        log.info("connection", principal=None)
        log.debug("too small to count")
    log.error("another severity of the same event")
    assert stream.getvalue().count("\n") == 2 * MAX_LINES + 1
    now += WINDOW
    log.info("connection refused", why="origin")
    *_, summary, line = stream.getvalue().splitlines()
    assert "connection refused" in line
    if stream.isatty():
        assert summary[9:] == "info    lines left out connection_refused=900 connection=5"
    else:
        told = json.loads(summary)
        del told["timestamp"]
        assert told == {
            "level": "info",
            "event": "lines left out",
            "connection_refused": 900,
            "connection": 5,
        }


def test_left_out_errors_are_counted_at_level_error() -> None:
    stream = io.StringIO()
    set_up("error", stream, lambda: 0.0)
    for _ in range(MAX_LINES + 1):
        log.error("it failed", failure=ValueError())
        logging.getLogger("asyncio").error("socket.accept() out of system resource")
    assert len(objects(stream.getvalue())) == 2 * MAX_LINES
    write_left_out()
    write_left_out()
    *_, summary = objects(stream.getvalue())
    assert len(objects(stream.getvalue())) == 2 * MAX_LINES + 1
    assert (summary["level"], summary["it_failed"], summary["asyncio"]) == ("error", 1, 1)


def test_anonymous_flood_takes_no_lines_of_principal() -> None:
    stream = io.StringIO()
    set_up("info", stream, lambda: 0.0)
    for _ in range(10 * MAX_LINES):
        log.info("connection", address="192.0.2.1")
        log.info("connection", principal="mallory")
    log.info("connection", principal="alice")
    assert objects(stream.getvalue())[-1]["principal"] == "alice"
    for number in range(10 * NAMES):  # later principals share the count of anonymous clients
        log.info("connection", principal=f"user {number}")
    assert len(objects(stream.getvalue())) <= NAMES + 4 * MAX_LINES


async def test_left_out_count_is_written_after_window_without_new_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = asyncio.Event()

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            if "lines left out" in text:
                told.set()
            return super().write(text)

    now = 0.0
    monkeypatch.setattr(logs, "WINDOW", 0.01)
    set_up("info", Watched(), lambda: now)
    for _ in range(MAX_LINES + 1):
        log.info("connection")
    now += WINDOW
    async with asyncio.timeout(BOUND):
        await told.wait()


async def test_library_records_with_prompts_are_dropped(tmp_path: Path) -> None:
    async with Upstream() as upstream:
        for level in ("debug", "info"):
            arguments = ("-m", "wsserver", "serve", "--port", "0", "--log-level", level)
            async with run(
                *arguments,
                ANTHROPIC_LOG="debug",
                ANTHROPIC_BASE_URL=upstream.url,
                ANTHROPIC_API_KEY=f"sk-{SECRET}",
            ) as process:
                async with connect(await serve(process), proxy=None) as socket:
                    chat = Client(socket)
                    await chat.prompt("private", system="private")
                    await chat.next("done")
                process.process.terminate()
                assert await process.end() == 0
            assert "private" not in process.output
            assert SECRET not in process.output
            assert '"event": "generation"' in process.output


def test_embedding_program_gets_readable_records(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "wsserver"):
        log.info("generation", id="x y", reason="end_turn", seconds=1.2)
        log.error("it failed", failure=ValueError(SECRET))
    record, failure = caplog.records
    assert record.getMessage() == 'generation id="x y" reason=end_turn seconds=1.2'
    assert record.name == "wsserver"
    assert record.filename == "test_logs.py"
    event = record.event  # type: ignore[attr-defined]
    assert event == {"event": "generation", "id": "x y", "reason": "end_turn", "seconds": 1.2}
    assert failure.getMessage() == "it failed failure=ValueError where=nowhere"
    assert not failure.exc_info
    assert SECRET not in caplog.text


def test_import_configures_no_logging() -> None:
    program = (
        "import logging, wsserver\n"
        "assert not logging.getLogger().handlers\n"
        "assert not logging.getLogger('wsserver').handlers\n"
        "assert logging.getLogger('wsserver').level == logging.NOTSET\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=BOUND)


# Events of the server.


async def test_generation_is_one_log_event(
    chat: Client, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "wsserver"):
        start = await chat.prompt("the prompt is private")
        usage = wsserver.Usage(input_tokens=7, output_tokens=3)
        (await puppet.reply()).say("so is ", "the reply", wsserver.End("end_turn", usage)).end()
        await chat.text(start["id"])
        (event,) = generations(caplog)
    assert 0 <= event.pop("first_token") <= event.pop("seconds")
    assert event == {
        "event": "generation",
        "level": "INFO",
        "id": start["id"],
        "conversation": start["conversation"],
        "principal": "anonymous",
        "model": "puppet",
        "reason": "end_turn",
        "input_tokens": 7,
        "output_tokens": 3,
        "pieces": 2,
    }
    assert "private" not in caplog.text
    assert "reply" not in caplog.text


async def test_log_event_times_include_wait_in_queue(
    caplog: pytest.LogCaptureFixture,
) -> None:
    generation = Generation("g", "ada", Prompt(prompt="Hello?"), "puppet", None, accepted=1.0)
    generation.began, generation.first_piece, generation.ended = 5.0, 6.0, 7.0
    terminal = Done(id="g", seq=1, reason="end_turn", usage=wsserver.Usage())
    with caplog.at_level("INFO", "wsserver"):
        Reporter(Metrics()).ended(generation, terminal, None)
        (event,) = generations(caplog)
    assert (event["first_token"], event["seconds"]) == (5.0, 6.0)


async def test_stop_event_names_stopper(
    chat: Client, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "wsserver"):
        start = await chat.prompt()
        await puppet.reply()
        await chat.send({"type": "stop", "id": start["id"]})
        await chat.text(start["id"])
        (event,) = generations(caplog)
    assert (event["reason"], event["by"]) == ("stopped", "client")
    assert "first_token" not in event


@pytest.mark.parametrize(
    ("failure", "level"),
    [
        (RuntimeError(SECRET), "ERROR"),
        (ModelError(Code.OVERLOADED, SECRET), "WARNING"),
        (ModelError(Code.BAD_REQUEST, SECRET), "INFO"),
    ],
)
async def test_error_ref_is_in_one_log_line(
    chat: Client,
    puppet: Puppet,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
    level: str,
) -> None:
    failure.__cause__ = KeyError(SECRET)
    with caplog.at_level("INFO", "wsserver"):
        await chat.prompt()
        (await puppet.reply()).fail(failure)
        told = await chat.next("error")
        (event,) = generations(caplog)
    assert (event["ref"], event["error"], event["level"]) == (told["ref"], told["code"], level)
    assert "KeyError" in event.get("cause", "") + event.get("failure", "")
    assert ("puppet.py:" in event.get("where", "")) is (level == "ERROR")
    assert SECRET not in caplog.text


async def test_unusable_frames_are_logged_at_debug_only(
    server: wsserver.Server, chat: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        await chat.send("nonsense")
        assert (await chat.next("error"))["code"] == "invalid_json"
        await chat.send({"type": "stop"})
        assert (await chat.next("error"))["code"] == "not_running"
        for request in (
            b"\x16\x03\x01\x02\x00\x01",
            b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request)
            writer.write_eof()
            async with asyncio.timeout(BOUND):
                await reader.read()
            writer.close()
            await writer.wait_closed()
        assert [r for r in caplog.records if r.name != "websockets.server"] == []
        assert max((r.levelno for r in caplog.records), default=0) <= logging.INFO
    with caplog.at_level("DEBUG", "wsserver"):
        await chat.send("nonsense")
        told = await chat.next("error")
        assert f"frame refused ref={told['ref']} code=invalid_json" in caplog.messages


async def test_connection_is_one_log_event(
    server: wsserver.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "wsserver"):
        async with client(server) as chat:
            await chat.quiet()
        async with client(server) as other:  # a client after the first was closed
            await other.quiet()
            lines = [m for m in caplog.messages if m.startswith("connection ")]
    assert len(lines) == 1
    assert "code=1000" in lines[0]


async def serve(process: Process) -> str:
    return (await process.line(r"(ws://\S+)"))[1]


async def test_exception_text_of_custom_model_is_not_logged(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        f"SECRET = {SECRET!r}\n"
        "async def drop(): raise ValueError(SECRET)\n"
        "async def leaky(request):\n"
        "    task = asyncio.ensure_future(drop())\n"
        "    await asyncio.wait({task})\n"
        "    del task\n"
        "    asyncio.get_running_loop().call_soon(int, SECRET)\n"
        "    yield 'here'\n"
        "    try: raise KeyError(SECRET)\n"
        "    except KeyError as error: raise RuntimeError(SECRET) from error\n"
    )
    served = ("-m", "wsserver", "serve", "--port", "0", "--model", "mine:leaky")
    async with run(*served, cwd=tmp_path) as process:
        async with connect(await serve(process), proxy=None) as socket:
            chat = Client(socket)
            await chat.prompt("private")
            failed = await chat.next("error")
        process.process.terminate()
        assert await process.end() == 0
    assert SECRET not in str(chat.frames)
    assert SECRET not in process.output
    assert "private" not in process.output
    events = [json.loads(line) for line in process.output.splitlines() if line.startswith("{")]
    # asyncio appends the name of the callback, and uvloop a text that is removed.
    assert {event["event"].removesuffix(" int") for event in events} >= {
        "generation",
        "connection",
        "Task exception was never retrieved",
        "Exception in callback",
    }
    (event,) = [event for event in events if event.get("ref") == failed["ref"]]
    assert event["failure"] == "RuntimeError from KeyError"
    assert "mine.py:11 in leaky" in event["where"]


async def test_error_text_of_api_is_not_logged(tmp_path: Path) -> None:
    async with Upstream() as upstream:
        upstream.default = Script((error(401, "authentication_error", SECRET),))
        serving = ("-m", "wsserver", "serve", "--port", "0")
        async with run(
            *serving, ANTHROPIC_BASE_URL=upstream.url, ANTHROPIC_API_KEY=f"sk-{SECRET}"
        ) as process:
            async with connect(await serve(process), proxy=None) as socket:
                chat = Client(socket)
                await chat.prompt("private")
                failed = await chat.next("error")
            process.process.terminate()
            assert await process.end() == 0
    assert SECRET not in str(chat.frames) + process.output
    events = [json.loads(line) for line in process.output.splitlines() if line.startswith("{")]
    (event,) = [event for event in events if event.get("ref") == failed["ref"]]
    assert (event["level"], event["error"]) == ("warning", "credentials")
    assert event["cause"] == "MessagesError"
    assert (event["kind"], event["status"]) == ("authentication_error", 401)
    assert event["request_id"].startswith("req_")
