"""Failures before and during a reply, and their retries."""

import pytest

import wsserver
from tests.support.claude import claude, goes_on
from tests.support.client import Client, client
from tests.support.upstream import (
    END,
    GARBAGE,
    INVALID_UTF8,
    MALFORMED_JSON,
    Answer,
    Cut,
    Hang,
    Script,
    Step,
    Upstream,
    error,
    error_event,
    event,
    refused_url,
    reply,
    stream,
)
from wsserver.models.anthropic.failures import MessagesError, of_event
from wsserver.models.failures import TransientError

AT_ONCE = {"retry-after": "0"}


@pytest.mark.parametrize(
    ("status", "kind", "error_code", "code", "attempts"),
    [
        (400, "invalid_request_error", None, "bad_request", 1),
        (401, "authentication_error", None, "credentials", 1),
        (402, "billing_error", None, "spend_limit", 1),
        (403, "permission_error", None, "credentials", 1),
        (403, "billing_error", None, "spend_limit", 1),
        (404, "not_found_error", None, "model_not_found", 1),
        (408, "timeout_error", None, "timeout", 3),
        (413, "request_too_large", None, "request_too_large", 1),
        (418, "teapot_error", None, "bad_request", 1),
        (429, "rate_limit_error", None, "rate_limited", 3),
        (429, "rate_limit_error", "ramp_limit_exceeded", "rate_limited", 3),
        (429, "rate_limit_error", "enforced_spend_limit_reached", "spend_limit", 1),
        (429, "rate_limit_error", "contract_spend_limit_reached", "spend_limit", 1),
        (500, "api_error", None, "upstream_error", 3),
        (502, "api_error", None, "upstream_error", 3),
        (503, "api_error", None, "overloaded", 3),
        (504, "timeout_error", None, "timeout", 3),
        (529, "overloaded_error", None, "overloaded", 3),
    ],
)
async def test_refused_request_is_one_error_with_stable_code(
    chat: Client,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
    status: int,
    kind: str,
    error_code: str | None,
    code: str,
    attempts: int,
) -> None:
    refused = error(status, kind, "planted-secret", error_code=error_code, headers=AT_ONCE)
    upstream.default = Script((refused,))
    caplog.set_level("INFO", "wsserver")
    await chat.prompt()
    failed = await chat.next("error")
    assert failed["code"] == code
    assert failed["retryable"] is wsserver.Code[code.upper()].retryable
    assert len(upstream.requests) == attempts
    assert "planted-secret" not in str(chat.frames)
    (line,) = [r.getMessage() for r in caplog.records if failed["ref"] in r.getMessage()]
    assert kind in line
    assert "planted-secret" not in caplog.text
    upstream.default = reply("Hello world")
    await goes_on(chat)


@pytest.mark.parametrize("body", ["404 page not found", '{"detail": "Not Found"}'])
async def test_wrong_url_is_explained_to_operator(
    chat: Client, upstream: Upstream, caplog: pytest.LogCaptureFixture, body: str
) -> None:
    upstream.play(Answer(404, "application/json", body))
    caplog.set_level("INFO", "wsserver")
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "model_not_found"
    assert "correct ANTHROPIC_BASE_URL: the URLs of most servers have no /v1" in caplog.text


@pytest.mark.parametrize(
    ("name", "logged"), [("req_011CSHoEeqs5C35K2UUqR7Fy", True), ("sk-planted-secret", False)]
)
def test_api_request_id_is_logged_if_well_formed(name: str, logged: bool) -> None:
    cause = {"type": "overloaded_error", "message": "No luck"}
    body = {"type": "error", "error": cause, "request_id": name}
    for failure in (MessagesError(529, {"request-id": name}, body).failure(), of_event(body)):
        assert isinstance(failure, TransientError)
        assert failure.error.request_id == (name if logged else None)
        assert failure.error.kind == "overloaded_error"


async def test_failed_attempt_is_retried(chat: Client, upstream: Upstream) -> None:
    upstream.play(
        error(429, "rate_limit_error", headers={"retry-after-ms": "1"}),
        error(529, "overloaded_error", headers=AT_ONCE),
        reply("at last"),
    )
    start = await chat.prompt()
    assert (await chat.text(start["id"]))[0] == "at last"
    assert len(upstream.requests) == 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3600", 3600), ("Wed, 21 Oct 2099 07:28:00 GMT", None)],
    ids=["seconds", "a date"],
)
async def test_retry_after_beyond_retry_time_reaches_client(
    chat: Client, upstream: Upstream, value: str, seconds: float | None
) -> None:
    upstream.play(error(429, "rate_limit_error", headers={"retry-after": value}))
    await chat.prompt()
    failed = await chat.next("error")
    assert failed["retry_after"] == (seconds or failed["retry_after"])
    assert failed["retry_after"] >= 3600
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
async def test_malformed_retry_after_is_ignored(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, value: str
) -> None:
    upstream.default = Script((error(429, "rate_limit_error", headers={"retry-after": value}),))
    async with claude(monkeypatch, upstream.url, retries=0) as server, client(server) as chat:
        await chat.prompt()
        assert "retry_after" not in await chat.next("error")


async def test_x_should_retry_false_ends_retries(chat: Client, upstream: Upstream) -> None:
    headers = {"x-should-retry": "false"}
    upstream.default = Script((error(500, "api_error", headers=headers),))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "upstream_error"
    assert len(upstream.requests) == 1


async def test_pause_without_retry_after_has_full_jitter(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.0

    monkeypatch.setattr("wsserver.models.streamed.random.uniform", uniform)
    upstream.default = Script((error(500, "api_error"),))
    await chat.prompt()
    await chat.next("error")
    assert bounds[:2] == [(0, 0.5), (0, 1.0)]


async def test_refused_connection_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused_url() as url:
        async with claude(monkeypatch, url, retries=0) as server, client(server) as chat:
            await chat.prompt()
            failed = await chat.next("error")
    assert (failed["code"], failed["retryable"]) == ("unreachable", True)


async def test_untrusted_certificate_gets_no_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Upstream(tls=True) as upstream, claude(monkeypatch, upstream.url) as server:
        async with client(server) as chat:
            await chat.prompt()
            failed = await chat.next("error")
    assert (failed["code"], failed["retryable"]) == ("untrusted", False)
    assert upstream.requests == []


async def test_connection_lost_before_headers_is_unreachable(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    upstream.default = Script((Cut(),))
    async with claude(monkeypatch, upstream.url, retries=0) as server, client(server) as chat:
        await chat.prompt()
        assert (await chat.next("error"))["code"] == "unreachable"


@pytest.mark.parametrize("script", [Hang(), stream(Hang()), stream(Hang(ping_every=0.01))])
async def test_silent_api_is_timeout_and_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, script: Script | Step
) -> None:
    # The first prompt loads the SDK, so that the second has its whole time limit.
    upstream.play(reply("ready"), script)
    async with claude(monkeypatch, upstream.url, retries=0, silence_timeout=1) as server:
        async with client(server) as chat:
            await chat.prompt()
            await chat.next("done")
            await chat.prompt()
            failed = await chat.next("error")
            assert (failed["code"], failed["retryable"]) == ("timeout", True)
        assert await upstream.requests[1].closed() == "closed"


@pytest.mark.parametrize(
    "fault",
    [
        stream(END),
        stream(event("ping"), END),
        reply(END),
        stream(event("message_stop"), END),
        reply(Cut()),
    ],
    ids=["nothing", "a ping", "a start", "an end of nothing", "cut"],
)
async def test_truncated_body_without_text_is_retried(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream, fault: Script
) -> None:
    monkeypatch.setattr("wsserver.models.streamed.random.uniform", lambda low, high: 0.0)
    upstream.play(fault, reply("at last"))
    start = await chat.prompt()
    assert (await chat.text(start["id"]))[0] == "at last"
    assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (error_event("overloaded_error"), "overloaded"),
        (error_event("api_error"), "upstream_error"),
        (error_event("rate_limit_error"), "rate_limited"),
        (error_event("invalid_request_error"), "bad_request"),
        (error_event("an_error_of_tomorrow"), "upstream_error"),
        (Cut(), "incomplete"),
        (Cut(reset=True), "incomplete"),
        (END, "incomplete"),
        (GARBAGE, "malformed"),
        (MALFORMED_JSON, "malformed"),
        (INVALID_UTF8, "malformed"),
        (b"data: []\n\n", "malformed"),
        (b"data: 5\n\n", "malformed"),
        (b'data: {"type": "content_block_delta"}\n\n', "malformed"),
        (
            b'data: {"type": "content_block_delta", "delta": {"type": "text_delta"}}\n\n',
            "malformed",
        ),
        (
            b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":5}}\n\n',
            "malformed",
        ),
        (b"data: " + b"x" * 1_100_000, "malformed"),
        (event("message_stop"), "incomplete"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:50],
)
async def test_fault_mid_stream_is_one_error_and_keeps_text(
    chat: Client, upstream: Upstream, fault: bytes | Step, code: str
) -> None:
    upstream.play(reply("half an ", "answer", fault, " more"))
    start = await chat.prompt()
    text, failed = await chat.text(start["id"])
    assert (text, failed["code"]) == ("half an answer", code)
    assert failed["retryable"] is wsserver.Code[code.upper()].retryable
    assert failed["seq"] >= 1
    assert failed["usage"]["estimated"] is True
    assert "No luck" not in str(chat.frames)
    assert len(upstream.requests) == 1, "never again once something was said"
    await goes_on(chat)
    sent = (await upstream.request(1)).body["messages"]
    assert sent[1] == {"role": "assistant", "content": "half an answer"}


async def test_silence_after_some_tokens_is_timeout(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    upstream.play(reply("half", Hang(ping_every=0.01)))
    async with claude(monkeypatch, upstream.url, silence_timeout=1) as server:
        async with client(server) as chat:
            start = await chat.prompt()
            text, failed = await chat.text(start["id"])
            assert (text, failed["code"]) == ("half", "timeout")
        assert await upstream.requests[0].closed() == "closed"


async def test_error_event_before_first_text_is_retried(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    monkeypatch.setattr("wsserver.models.streamed.random.uniform", lambda low, high: 0.0)
    upstream.play(reply(error_event("overloaded_error")), reply("at last"))
    start = await chat.prompt()
    assert (await chat.text(start["id"]))[0] == "at last"
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
async def test_response_of_other_content_type_is_malformed(
    chat: Client, upstream: Upstream, kind: str
) -> None:
    upstream.play(Answer(200, kind, "<html>hello</html>"))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "malformed"


async def test_damaged_compression_is_malformed_and_not_retried(
    chat: Client, upstream: Upstream
) -> None:
    headers = {"content-encoding": "gzip"}
    upstream.play(Answer(200, "text/event-stream", "this is not gzip", headers))
    _, error_ = await chat.text((await chat.prompt())["id"])
    assert error_["code"] == "malformed"
    assert len(upstream.requests) == 1


async def test_exception_in_server_is_internal_error(
    chat: Client, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr("wsserver.hub.journal.Record.wake", broken)
    upstream.play(reply("Hello", thinking="hm"))
    _, error_ = await chat.text((await chat.prompt())["id"])
    assert error_["code"] == "internal"
