"""Failures before and during a reply, their retries, and parameters that a model refuses."""

import json

import pytest

import wsserver
from tests.support.claude import goes_on
from tests.support.client import Client, client
from tests.support.completions import (
    DONE,
    LAST,
    chunk,
    completion,
    data,
    delta,
    failure,
    failure_event,
)
from tests.support.upstream import (
    END,
    GARBAGE,
    Answer,
    Cut,
    Hang,
    Script,
    Step,
    Upstream,
    refused_url,
    stream,
)
from wsserver.models.failures import TransientError
from wsserver.models.openai.failures import ChatError

AT_ONCE = {"retry-after": "0"}
CONTEXT = "This model's maximum context length is 4096 tokens. However, "


@pytest.mark.parametrize(
    ("status", "keys", "code", "attempts"),
    [
        (400, {"type": "invalid_request_error"}, "bad_request", 1),
        (400, {"code": "context_length_exceeded"}, "prompt_too_long", 1),
        (400, {"type": "exceed_context_size_error", "code": 400}, "prompt_too_long", 1),
        (400, {"code": "content_policy_violation"}, "refusal", 1),
        (401, {"code": "invalid_api_key"}, "credentials", 1),
        (402, {"code": 402}, "spend_limit", 1),
        (403, {"code": "unsupported_country"}, "credentials", 1),
        (404, {"code": "model_not_found"}, "model_not_found", 1),
        (408, {}, "timeout", 3),
        (413, {}, "request_too_large", 1),
        (418, {}, "bad_request", 1),
        (429, {"code": "rate_limit_exceeded"}, "rate_limited", 3),
        (429, {"code": "insufficient_quota"}, "spend_limit", 1),
        (500, {"type": "server_error"}, "upstream_error", 3),
        (502, {}, "upstream_error", 3),
        (503, {}, "overloaded", 3),
        (504, {}, "timeout", 3),
    ],
)
async def test_refused_request_is_one_error_with_stable_code(
    chat: Client,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
    status: int,
    keys: dict[str, object],
    code: str,
    attempts: int,
) -> None:
    refused = failure(status, AT_ONCE, message="planted-secret", **keys)
    upstream.default = Script((refused,))
    caplog.set_level("INFO", "wsserver")
    await chat.prompt()
    failed = await chat.next("error")
    assert failed["code"] == code
    assert failed["retryable"] is wsserver.Code[code.upper()].retryable
    assert len(upstream.requests) == attempts
    assert "planted-secret" not in str(chat.frames) + caplog.text
    upstream.default = completion("Hello world")
    await goes_on(chat)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (404, {"error": "model 'x' not found"}, "model_not_found"),
        (400, {"object": "error", "message": CONTEXT, "code": 400}, "prompt_too_long"),
        (500, {"error": {"message": "Context size has been exceeded."}}, "prompt_too_long"),
        (400, [{"error": {"code": 400, "message": "The input is too long"}}], "prompt_too_long"),
        (400, {"error": None}, "bad_request"),
        (400, [], "bad_request"),
        (400, {"error": {"message": {}, "code": [], "type": 5}}, "bad_request"),
        (401, None, "credentials"),
        (
            400,
            {"error": {"message": "x is not a valid model ID"}},
            "model_not_found",
        ),
        (
            400,
            {"error": {"message": "Invalid model name passed in model=x", "code": "400"}},
            "model_not_found",
        ),
        (429, {"error": {"type": "budget_exceeded", "code": "429"}}, "spend_limit"),
        (403, {"error": {"code": 403, "metadata": {"reasons": ["violence"]}}}, "refusal"),
    ],
)
def test_errors_of_other_servers_have_codes(status: int, body: object, code: str) -> None:
    failed = ChatError(status, {}, body).failure()
    assert not isinstance(failed, TransientError)
    assert failed.code == code


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, None),
        (404, {"detail": "Not Found"}),
        (404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}),
        (404, {"error": {"message": "Invalid URL (POST /chat/completions)", "code": None}}),
        (405, {"detail": "Method Not Allowed"}),
        (200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
    ],
)
async def test_wrong_url_is_explained_to_operator(
    chat: Client,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: object,
) -> None:
    text = "404 page not found" if body is None else json.dumps(body)
    upstream.play(Answer(status, "application/json" if body else "text/plain", text))
    caplog.set_level("INFO", "wsserver")
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "model_not_found"
    assert "correct OPENAI_BASE_URL: the URLs of most servers end in /v1" in caplog.text


async def test_refused_image_in_a_stream_is_not_called_a_wrong_path(
    chat: Client, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    error = {"message": "Invalid URL in image_url", "code": 400}
    upstream.play(Answer(200, "application/json", json.dumps({"error": error})))
    caplog.set_level("INFO", "wsserver")
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "bad_request"
    assert "OPENAI_BASE_URL" not in caplog.text


async def test_unknown_model_is_not_called_a_wrong_url(
    chat: Client, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.play(failure(404, message='model "x" not found, try pulling it first'))
    caplog.set_level("DEBUG", "wsserver")
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "model_not_found"
    assert "try pulling it first" in caplog.text
    assert "OPENAI_BASE_URL" not in caplog.text


@pytest.mark.parametrize(
    ("name", "logged"), [("req_011CSHoEeqs5C35K2UUqR7Fy", True), ("sk-planted-secret", False)]
)
def test_request_id_is_logged_if_well_formed(name: str, logged: bool) -> None:
    failed = ChatError(529, {"x-request-id": name}, None).failure()
    assert isinstance(failed, TransientError)
    assert failed.error.request_id == (name if logged else None)


async def test_failed_attempt_is_retried(chat: Client, upstream: Upstream) -> None:
    upstream.play(
        failure(429, {"retry-after-ms": "1"}), failure(503, AT_ONCE), completion("at last")
    )
    assert (await chat.text((await chat.prompt())["id"]))[0] == "at last"
    assert len(upstream.requests) == 3


@pytest.mark.parametrize(
    "fault",
    [stream(END), stream(DONE), stream(delta(role="assistant"), DONE), completion(Cut())],
    ids=["nothing", "an end of nothing", "a start", "cut"],
)
async def test_truncated_body_without_text_is_retried(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream, fault: Script
) -> None:
    monkeypatch.setattr("wsserver.models.streamed.random.uniform", lambda low, high: 0.0)
    upstream.play(fault, completion("at last"))
    assert (await chat.text((await chat.prompt())["id"]))[0] == "at last"
    assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (failure_event(code=429), "rate_limited"),
        (failure_event(code=502, metadata={}), "upstream_error"),
        (failure_event(code="rate_limit_exceeded"), "rate_limited"),
        (failure_event(type="server_error"), "upstream_error"),
        (failure_event(type="exceed_context_size_error", code=500), "prompt_too_long"),
        (failure_event(type="None", param="None", code="429"), "rate_limited"),
        (data({"object": "error", "message": "No luck", "code": 429}), "rate_limited"),
        (b'error: {"code":503,"message":"No luck"}\n\n' + DONE, "overloaded"),
        (b'event: error\ndata: {"error": {"message": "No luck"}}\n\n', "upstream_error"),
        (data({"error": "No luck"}), "upstream_error"),
        (delta("error"), "incomplete"),
        (Cut(), "incomplete"),
        (Cut(reset=True), "incomplete"),
        (END, "incomplete"),
        (GARBAGE, "malformed"),
        (b'data: {"choices": [{"delta":\n\n', "malformed"),
        (b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n', "malformed"),
        (b"data: []\n\n", "malformed"),
        (b"data: 5\n\n", "malformed"),
        (b'data: {"choices": 5}\n\n', "malformed"),
        (b'data: {"choices": [5]}\n\n', "malformed"),
        (chunk({"delta": {"content": 5}}), "malformed"),
        (chunk({"delta": {"reasoning": 5}}), "malformed"),
        (chunk({"delta": {"tool_calls": [5]}}), "malformed"),
        (chunk({"delta": {"tool_calls": [{"function": {"arguments": 5}}]}}), "malformed"),
        (chunk({"delta": {}, "finish_reason": 5}), "malformed"),
        (chunk(usage=5), "malformed"),
        (chunk(usage={"prompt_tokens": "many"}), "malformed"),
        (b"data: " + b"x" * 1_100_000, "malformed"),
        (DONE, "incomplete"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:50],
)
async def test_fault_mid_stream_is_one_error_and_keeps_text(
    chat: Client, upstream: Upstream, fault: bytes | Step, code: str
) -> None:
    rest = (END,) if fault == delta("error") else ()
    upstream.play(completion("half an ", "answer", fault, *rest, " more"))
    start = await chat.prompt()
    text, failed = await chat.text(start["id"])
    code = "upstream_error" if rest else code
    assert (text, failed["code"]) == ("half an answer", code)
    assert failed["retryable"] is wsserver.Code[code.upper()].retryable
    assert "No luck" not in str(chat.frames)
    assert len(upstream.requests) == 1, "never again once something was said"
    await goes_on(chat)


async def test_malformed_call_of_a_tool_is_malformed(chat: Client, upstream: Upstream) -> None:
    for arguments in ("[1]", "{"):
        call = delta(tool_calls=[{"id": "call_1", "function": {"arguments": arguments}}])
        upstream.play(completion("Looking. ", call, reason="tool_calls"))
        text, failed = await chat.text((await chat.prompt())["id"])
        assert (text, failed["code"]) == ("Looking. ", "malformed")


async def test_refused_connection_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused_url() as url:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        async with (
            wsserver.serve(model="openai:a", port=0, retries=0) as server,
            client(server) as chat,
        ):
            await chat.prompt()
            assert (await chat.next("error"))["code"] == "unreachable"


async def test_empty_reason_is_no_end(chat: Client, upstream: Upstream) -> None:
    upstream.play(stream(delta("", content="half an answer"), END))
    text, failed = await chat.text((await chat.prompt())["id"])
    assert (text, failed["code"]) == ("half an answer", "incomplete")


@pytest.mark.parametrize(
    ("body", "code", "attempts"),
    [
        ({"error": {"code": 402, "message": "No luck"}}, "spend_limit", 1),
        ({"error": {"code": 429, "message": "No luck"}}, "rate_limited", 3),
        ({"error": {"message": "This model's maximum context length is 8"}}, "prompt_too_long", 1),
        ({"choices": [{"message": {"content": "Yes"}}]}, "malformed", 1),
        ({"error": None}, "malformed", 1),
    ],
)
async def test_error_with_status_200_has_its_own_code(
    chat: Client, upstream: Upstream, body: object, code: str, attempts: int
) -> None:
    upstream.default = Script((Answer(200, "application/json", json.dumps(body)),))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == code
    assert len(upstream.requests) == attempts


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
async def test_response_of_other_content_type_is_malformed(
    chat: Client, upstream: Upstream, kind: str
) -> None:
    upstream.play(Answer(200, kind, "<html>hello</html>"))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "malformed"


@pytest.mark.parametrize(
    "script",
    [
        Hang(),
        stream(Hang()),
        completion("some words", Hang()),
        completion("word " * 100, interval=0.01),
    ],
    ids=["before headers", "after headers", "mid-stream", "streaming"],
)
async def test_stop_closes_request(chat: Client, upstream: Upstream, script: Script | Step) -> None:
    upstream.play(script)
    start = await chat.prompt()
    received = await upstream.request()
    await chat.send({"type": "stop", "id": start["id"]})
    assert (await chat.text(start["id"]))[1]["by"] == "client"
    assert await received.closed() == "closed"
    await goes_on(chat)


# Parameters that a model refuses.


def refused(parameter: str, message: str = "") -> Answer:
    message = message or f"Unsupported parameter: '{parameter}' is not supported."
    return failure(400, message=message, param=parameter, code="unsupported_parameter")


@pytest.mark.parametrize("parameter", ["temperature", "stream_options"])
async def test_refused_parameter_is_left_out_from_then_on(
    chat: Client, upstream: Upstream, parameter: str
) -> None:
    upstream.play(refused(parameter), completion("Yes"))
    await chat.text((await chat.prompt("One", temperature=0.5))["id"])
    await chat.text((await chat.prompt("Two", temperature=0.5))["id"])
    assert [parameter in received.body for received in upstream.requests] == [True, False, False]


async def test_refused_name_of_the_limit_is_replaced(chat: Client, upstream: Upstream) -> None:
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead."
    )
    upstream.play(refused("max_tokens", message), completion("Yes"))
    await chat.text((await chat.prompt("One", max_tokens=77))["id"])
    await chat.text((await chat.prompt("Two", max_tokens=77))["id"])
    limits = [
        (received.body.get("max_tokens"), received.body.get("max_completion_tokens"))
        for received in upstream.requests
    ]
    assert limits == [(77, None), (None, 77), (None, 77)]


async def test_model_that_refuses_both_names_of_the_limit_fails(
    chat: Client, upstream: Upstream
) -> None:
    upstream.play(refused("max_tokens"), refused("max_completion_tokens"))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "bad_request"
    assert len(upstream.requests) == 2


async def test_temperature_outside_range_is_told_to_client(
    chat: Client, upstream: Upstream
) -> None:
    message = "Invalid 'temperature': decimal above maximum value. Expected a value <= 1.5."
    upstream.play(failure(400, message=message, param="temperature"))
    await chat.prompt("One", temperature=2)
    failed = await chat.next("error")
    assert failed["code"] == "bad_request"
    assert failed["message"].startswith("temperature: ")
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    "message",
    [
        CONTEXT + "you requested 8392 tokens (200 in the messages, 8192 in the completion).",
        "'max_tokens' or 'max_completion_tokens' is too large: 8192. "
        + CONTEXT.replace(". However, ", " and your request has 200 input tokens."),
    ],
)
async def test_limit_beyond_the_context_is_lowered(
    chat: Client, upstream: Upstream, message: str
) -> None:
    upstream.play(failure(400, message=message), completion("Yes"))
    assert (await chat.text((await chat.prompt())["id"]))[0] == "Yes"
    assert [r.body["max_tokens"] for r in upstream.requests] == [8192, 3896]


@pytest.mark.parametrize("digits", ["9" * 60_000, "9" * 4301 + " input tokens"])
def test_message_with_endless_digits_is_read_at_once(digits: str) -> None:
    error = ChatError(400, {}, {"error": {"message": f"{CONTEXT}{digits}"}})
    assert error.fitting(8192) is None
    error = ChatError(
        400, {}, {"error": {"message": f"{CONTEXT.replace('4096', digits)}5 in the messages"}}
    )
    assert error.fitting(8192) is None


async def test_longer_history_than_the_context_is_shortened(
    chat: Client, upstream: Upstream
) -> None:
    for number in range(6):
        await chat.text((await chat.prompt(f"{number} " + "word " * 500))["id"])
    upstream.play(failure(400, code="context_length_exceeded"), completion("Yes"))
    assert (await chat.text((await chat.prompt("And now?"))["id"]))[0] == "Yes"
    *_, long, short = (len(received.body["messages"]) for received in upstream.requests)
    assert long > short


def test_last_chunk_is_recognised_by_the_fast_path_only_if_plain() -> None:
    from wsserver.models.openai.reply import ChatReply

    assert ChatReply.plain.fullmatch(delta(content="Hello").strip())
    assert not ChatReply.plain.fullmatch(LAST.strip())
    assert not ChatReply.plain.fullmatch(delta(content="a\nb").strip())
