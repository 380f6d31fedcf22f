"""Metrics of real generations, and spans of real requests."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.upstream import Script, Upstream, error, reply
from tests.test_slow_reader import WORD, sluggard
from wsserver import Code, End, ModelError, Usage, telemetry
from wsserver.telemetry import Metrics

MODEL = "claude-sonnet-4-6"
SECRET = "hunter2-planted"


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[str]], float]:
    """Return all numbers, by name and the values of the labels."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def value(server: wsserver.Server, name: str, *labels: str) -> float:
    return samples(server.metrics)["wsserver_" + name, frozenset(labels)]


async def say(chat: Client, puppet: Puppet, *pieces: str | Usage | End) -> None:
    start = await chat.prompt()
    (await puppet.reply(len(puppet.replies) - 1)).say(*pieces).end()
    await chat.text(start["id"])


async def fail(chat: Client, puppet: Puppet, failure: Exception) -> None:
    start = await chat.prompt()
    (await puppet.reply(len(puppet.replies) - 1)).fail(failure)
    await chat.text(start["id"])


# Metrics


async def test_connections_are_counted_by_outcome(server: wsserver.Server) -> None:
    assert value(server, "connections_open") == 0
    assert value(server, "connections_total", "served") == 0
    async with client(server) as chat:
        await chat.quiet()
        assert value(server, "connections_open") == 1
    await until(lambda: value(server, "connections_open") == 0)
    assert value(server, "connections_total", "served") == 1
    server.metrics.connection_refused("origin")
    assert value(server, "connections_total", "origin") == 1


async def test_reply_is_counted_and_timed(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    start = await chat.prompt()
    speaker = await puppet.reply()
    assert value(server, "generations_running") == 1
    assert value(server, "generations_total", "done", "end_turn") == 0
    usage = Usage(10, 20, cache_creation_input_tokens=30, cache_read_input_tokens=40)
    speaker.say("one ", "two", End("end_turn", usage)).end()
    await chat.text(start["id"])
    assert value(server, "generations_running") == 0
    assert value(server, "generations_total", "done", "end_turn") == 1
    assert value(server, "time_to_first_token_seconds_count") == 1
    assert value(server, "generation_duration_seconds_count") == 1
    assert value(server, "tokens_total", "input", "puppet") == 10
    assert value(server, "tokens_total", "output", "puppet") == 20
    assert value(server, "tokens_total", "cache_creation", "puppet") == 30
    assert value(server, "tokens_total", "cache_read", "puppet") == 40
    assert value(server, "store_commit_seconds_count") >= 1
    assert value(server, "store_commits_failed_total") == 0


async def test_unknown_stop_reason_counts_as_other(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await say(chat, puppet, End("reason-1"))
    await say(chat, puppet, End("stopped"))
    assert value(server, "generations_total", "done", "other") == 2
    assert b"reason-1" not in server.metrics.exposition()
    assert value(server, "time_to_first_token_seconds_count") == 0


async def test_stop_is_counted_by_stopper_and_timed(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    start = await chat.prompt()
    waiting = await chat.prompt(on_busy="queue")
    await puppet.reply()
    await chat.send({"type": "stop", "id": waiting["id"]})
    await chat.text(waiting["id"])
    assert value(server, "generation_duration_seconds_count") == 0, "it was never asked"
    assert value(server, "stop_latency_seconds_count") == 0
    await chat.send({"type": "stop", "id": start["id"]})
    await chat.text(start["id"])
    assert value(server, "generations_total", "stopped", "client") == 2
    assert value(server, "generations_running") == 0
    assert value(server, "stop_latency_seconds_count") == 1


async def test_errors_are_counted_by_code(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await fail(chat, puppet, ModelError(Code.OVERLOADED))
    await fail(chat, puppet, ModelError(Code.REFUSAL))
    await fail(chat, puppet, RuntimeError())
    assert value(server, "generations_total", "error", "overloaded") == 1
    assert value(server, "generations_total", "error", "refusal") == 1
    assert value(server, "generations_total", "error", "internal") == 1
    assert value(server, "upstream_errors_total", "overloaded") == 1
    assert ("wsserver_upstream_errors_total", frozenset({"refusal"})) not in samples(server.metrics)


async def test_refused_frames_and_prompts_are_counted(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await chat.send("nonsense")
    await chat.send({"type": "stop"})
    await chat.quiet()
    await chat.prompt()
    assert (await chat.prompt())["code"] == "busy"
    assert value(server, "frames_refused_total", "none", "invalid_json") == 1
    assert value(server, "frames_refused_total", "stop", "not_running") == 1
    assert value(server, "frames_refused_total", "prompt", "busy") == 1


async def test_pieces_merged_for_slow_reader_are_counted(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as quick:
        await say(quick, puppet, "one ", "two ", "three ")
    assert value(server, "pieces_merged_total") == 0
    async with sluggard(server) as slow:
        await slow.send('{"prompt": "Talk"}')
        speaker = (await puppet.reply(1)).say(*[WORD] * 30_000)
        await until(speaker.heard_out)
        speaker.end()
        await slow.until('"done"')
    assert value(server, "pieces_merged_total") > 1000


async def test_aborted_reader_is_counted(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, send_timeout=0.05, drain_timeout=0) as server:
        async with sluggard(server) as slow:
            await slow.send('{"prompt": "Talk"}')
            (await puppet.reply()).say(*[WORD] * 30_000)
            await until(lambda: value(server, "readers_aborted_total", "does not read"))


async def test_event_loop_lag_is_measured_until_close(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    monkeypatch.setattr(telemetry, "BEAT", 0.0)  # once in each turn of the event loop
    async with wsserver.serve(puppet, port=0) as server:
        await until(lambda: value(server, "event_loop_lag_seconds_count") > 2)
    measured = value(server, "event_loop_lag_seconds_count")
    for _ in range(10):
        await asyncio.sleep(0)
    assert value(server, "event_loop_lag_seconds_count") == measured


async def test_servers_of_one_process_have_separate_metrics(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0) as one, wsserver.serve(puppet, port=0) as two:
        async with client(one) as chat:
            await say(chat, puppet, "x")
        assert value(one, "generations_total", "done", "end_turn") == 1
        assert value(two, "generations_total", "done", "end_turn") == 0


async def test_metrics_include_the_process(server: wsserver.Server) -> None:
    names = {name for name, _ in samples(server.metrics)}
    assert "python_info" in names
    assert not sys.platform.startswith("linux") or "process_resident_memory_bytes" in names
    assert server.metrics.content_type.startswith("text/plain")


# Outages of the model's API


async def test_api_outage_lasts_until_success_or_time_limit(
    monkeypatch: pytest.MonkeyPatch, server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    def failing() -> bool:
        return server.app.hub.reporter.upstream_failing

    for _ in range(5):
        assert not failing()
        await fail(chat, puppet, ModelError(Code.UNREACHABLE))
    assert failing()
    await chat.prompt(on_busy="queue")
    await puppet.reply(5)
    await chat.send({"type": "stop"})
    await chat.next("done")
    assert failing(), "who stops before the first piece knows nothing"
    monkeypatch.setattr("wsserver.hub.reporting.FAILING", 0.0)
    assert not failing()
    monkeypatch.undo()
    assert failing()
    await say(chat, puppet, "it works")
    assert not failing()


@pytest.mark.parametrize("failure", [ModelError(Code.BAD_REQUEST), RuntimeError()])
async def test_fault_of_prompt_is_no_api_outage(
    server: wsserver.Server, chat: Client, puppet: Puppet, failure: Exception
) -> None:
    for _ in range(6):
        await fail(chat, puppet, failure)
    assert not server.app.hub.reporter.upstream_failing


# Traces


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def ours(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name.startswith("chat ")]


def requests(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == "POST"]


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as running:
        yield running


@pytest.fixture
async def claude(
    monkeypatch: pytest.MonkeyPatch, spans: InMemorySpanExporter, upstream: Upstream
) -> AsyncIterator[wsserver.Server]:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", upstream.url)
    # also if the operator asks for content
    monkeypatch.setenv("ANTHROPIC_OPEN_TELEMETRY_TRACES_CONTENT_MODE", "content")
    async with wsserver.serve(port=0, drain_timeout=0) as server:
        yield server


async def test_reply_span_has_api_request_as_child(
    claude: wsserver.Server, upstream: Upstream, spans: InMemorySpanExporter
) -> None:
    upstream.default = reply("a private reply", output_tokens=9)
    async with client(claude) as chat:
        start = await chat.prompt(
            "a private prompt", system="a private rule", max_tokens=77, temperature=0.5
        )
        await chat.text(start["id"])
    (span,) = ours(spans)
    attributes = dict(span.attributes or {})
    assert span.name == f"chat {MODEL}"
    assert span.kind is trace.SpanKind.CLIENT
    assert span.parent is None
    assert attributes.pop("wsserver.time_to_first_token") is not None
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.max_tokens": 77,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.conversation.id": start["conversation"],
        "gen_ai.response.finish_reasons": ("end_turn",),
        "gen_ai.usage.input_tokens": 25,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_creation.input_tokens": 0,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "wsserver.generation.id": start["id"],
    }
    (request,) = requests(spans)
    assert request.parent is not None
    assert span.context is not None
    assert request.parent.span_id == span.context.span_id
    assert request.kind is trace.SpanKind.CLIENT
    host, _, port = upstream.url.removeprefix("http://").partition(":")
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": host,
        "server.port": int(port),
        "url.full": f"{upstream.url}/v1/messages",
    }
    assert len(spans.get_finished_spans()) == 2
    assert not [s for s in spans.get_finished_spans() if "private" in s.to_json()]


async def test_each_attempt_is_span_with_resend_count(
    claude: wsserver.Server, upstream: Upstream, spans: InMemorySpanExporter
) -> None:
    upstream.play(error(529, "overloaded_error", headers={"retry-after": "0"}))
    async with client(claude) as chat:
        await chat.text((await chat.prompt())["id"])
    told = [dict(span.attributes or {}) for span in requests(spans)]
    statuses = [each["http.response.status_code"] for each in told]
    assert statuses == [529, 200]
    assert [each.get("http.request.resend_count") for each in told] == [None, 1]


async def test_failed_span_has_error_type_without_text(
    claude: wsserver.Server, upstream: Upstream, spans: InMemorySpanExporter
) -> None:
    upstream.default = Script((error(401, "authentication_error", SECRET),))
    async with client(claude) as chat:
        await chat.prompt()
        failed = await chat.next("error")
    (span,) = ours(spans)
    assert span.attributes is not None
    assert span.attributes["error.type"] == "credentials"
    assert span.attributes["wsserver.ref"] == failed["ref"]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert not span.events
    (request,) = requests(spans)
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 401
    assert request.attributes["error.type"] == "401"
    assert request.status.status_code is trace.StatusCode.ERROR
    assert not [s for s in spans.get_finished_spans() if SECRET in s.to_json()]
    assert value(claude, "upstream_errors_total", "credentials") == 1


async def test_span_has_no_exception_text_of_custom_model(
    spans: InMemorySpanExporter, chat: Client, puppet: Puppet
) -> None:
    await fail(chat, puppet, RuntimeError(SECRET))
    (span,) = ours(spans)
    assert span.attributes is not None
    assert span.attributes["error.type"] == "internal"
    assert span.attributes["gen_ai.provider.name"] == "puppet"
    assert SECRET not in span.to_json()


async def test_each_reply_is_new_trace_naming_stopper(
    spans: InMemorySpanExporter, server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    first = await chat.prompt()
    second = await chat.prompt(on_busy="queue")
    # From here on only the first reply has something to save.
    await until(lambda: not server.app.hub.journal.unsaved)
    (await puppet.reply()).say("x")
    await chat.next("token")
    await chat.send({"type": "stop", "id": first["id"]})
    await chat.text(first["id"])
    (await puppet.reply(1)).end()
    await chat.text(second["id"])
    one, two = ours(spans)
    assert one.attributes is not None
    assert two.attributes is not None
    assert (one.parent, two.parent) == (None, None)
    assert one.attributes["wsserver.stopped_by"] == "client"
    assert "gen_ai.response.finish_reasons" not in one.attributes
    assert two.attributes["wsserver.generation.id"] == second["id"]


@pytest.mark.parametrize("moment", ["on_start", "on_end"])
async def test_failing_span_processor_does_not_fail_reply(
    spans: InMemorySpanExporter,
    chat: Client,
    puppet: Puppet,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(SimpleSpanProcessor, moment, fails)
    for _ in range(2):  # the conversation is not busy afterwards
        await say(chat, puppet, "x")
    assert "span failed" in caplog.text
    assert SECRET not in caplog.text


async def test_replies_work_without_opentelemetry() -> None:
    program = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "import asyncio, wsserver\n"
        "from tests.support.client import client\n"
        "from wsserver import telemetry\n"
        "assert not telemetry.TRACING\n"
        "async def main():\n"
        "    async with wsserver.serve('demo', port=0, demo_rate=0) as server:\n"
        "        async with client(server) as chat:\n"
        "            start = await chat.prompt()\n"
        "            text, done = await chat.text(start['id'])\n"
        "            assert text and done['reason'] == 'end_turn'\n"
        "asyncio.run(main())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.')]\n"
    )
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], check=True, timeout=BOUND
    )
