"""Metrics for Prometheus and spans for OpenTelemetry.

Only this module imports these two libraries. Every label has a bounded set of values, whatever
clients and models send. Metrics are counted at the end of a reply, a connection or a batch, so a
token costs nothing. Spans are made if OpenTelemetry is installed; they cost next to nothing if no
program has configured OpenTelemetry. Spans contain neither prompts nor replies.
"""

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Iterator
from http import HTTPStatus
from typing import Literal, Self, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from wsserver.errors import UPSTREAM, Code, WsserverError
from wsserver.limits import Memory
from wsserver.logs import log
from wsserver.protocol import Done, StoppedBy, Terminal

try:
    from opentelemetry import trace
    from opentelemetry.context import Context, attach
except ImportError:
    TRACING = False
else:
    TRACING = True

Refusal = Literal["host", "origin", "unauthenticated", "limit", "unavailable"]
"""Reason for refusing a connection."""
Aborted = Literal["too much unsent", "does not read"]
"""Reason for aborting a connection."""
StreamEnd = Literal["complete", "disconnected", "unauthenticated", "failed"]
"""How a reply over one HTTP response ended for its client."""

REASONS = frozenset(
    {
        "end_turn",
        "max_tokens",
        "model_context_window_exceeded",
        "pause_turn",
        "stop_sequence",
        "tool_use",
    }
)
OTHER = "other"  # any other reason of a model

BEAT = 1.0  # seconds between two measurements of the event loop

# Bounds of histograms, in seconds. The last bounds are the defaults of the settings.
_TO_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60)
_REPLY = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_STOP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_COMMIT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """The metrics of one server. Each server of a process has a registry of its own."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4
    """Content type of :meth:`exposition`."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._beat: asyncio.TimerHandle | None = None
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"wsserver_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"wsserver_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"wsserver_{name}_seconds", text, buckets=buckets, registry=registry)

        self._open = gauge("connections_open", "Open WebSocket connections.")
        self._connections = counter(
            "connections_total",
            "WebSocket connections, by outcome: served, or the reason for refusing.",
            "outcome",
        )
        self._streams_open = gauge("streams_open", "Open HTTP responses that stream a reply.")
        self._streams = counter(
            "streams_total", "HTTP responses that streamed a reply, by their end.", "end"
        )
        self._memory = gauge(
            "memory_bytes", "Bytes in use for clients; the limit is the setting `memory`."
        )
        self._running = gauge("generations_running", "Replies that a model generates now.")
        self._generations = counter(
            "generations_total",
            "Replies that ended, by outcome and reason, stopper or error code.",
            "outcome",
            "why",
        )
        self._first_token = histogram(
            "time_to_first_token",
            "Time from a prompt to the first piece of its reply.",
            _TO_FIRST_TOKEN,
        )
        self._duration = histogram(
            "generation_duration",
            "Time from the request to a model to the end of the reply.",
            _REPLY,
        )
        self._tokens = counter(
            "tokens_total", "Tokens that models reported, or an estimate.", "kind", "model"
        )
        self._dollars = counter(
            "dollars_total", "US dollars that replies cost, by the known prices.", "model"
        )
        self._stop = histogram(
            "stop_latency", "Time from a stop to the end of the request to the model.", _STOP
        )
        self._upstream = counter(
            "upstream_errors_total", "Replies that failed because of the model's API.", "code"
        )
        self._merged = counter(
            "pieces_merged_total",
            "Pieces that were merged into frames with other pieces, for slow readers.",
        )
        self._aborted = counter(
            "readers_aborted_total", "Connections aborted because the client did not read.", "why"
        )
        self._lag = histogram("event_loop_lag", "Delay of a timer that fires once a second.", _LAG)
        self._commit = histogram("store_commit", "Time of the store for one batch.", _COMMIT)
        self._commits_failed = counter(
            "store_commits_failed_total", "Batches that the store could not save."
        )
        self._frames = counter(
            "frames_refused_total", "Refused frames, including prompts.", "type", "code"
        )
        # Counters by their labels: the library takes a lock and makes a tuple of texts each time.
        self._generations_of = functools.cache(self._generations.labels)
        self._streams_of = functools.cache(self._streams.labels)
        self._tokens_of = functools.cache(self._tokens.labels)
        self._dollars_of = functools.cache(self._dollars.labels)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Create all known label values: a rate needs a counter that begins at zero."""
        for outcome in ("served", *get_args(Refusal)):
            self._connections.labels(outcome)
        for end in get_args(StreamEnd):
            self._streams_of(end)
        for reason in (*REASONS, OTHER):
            self._generations_of("done", reason)
        for by in get_args(StoppedBy):
            self._generations_of("stopped", by)
        for code in (*UPSTREAM, Code.INTERNAL):
            self._generations_of("error", code)
        for code in UPSTREAM:
            self._upstream.labels(code)
        for why in get_args(Aborted):
            self._aborted.labels(why)

    def add(self, collector: Collector) -> None:
        """Add the metrics of another part of the server."""
        self._registry.register(collector)

    def exposition(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def watch_memory(self, memory: Memory) -> None:
        """Report the used bytes of a memory at each scrape."""
        self._memory.set_function(lambda: memory.used)

    def watch_loop(self) -> None:
        """Measure the delay of the running event loop, until :meth:`close`."""
        loop = asyncio.get_running_loop()

        def measure(due: float) -> None:
            now = loop.time()
            self._lag.observe(max(0.0, now - due))
            self._beat = loop.call_at(now + BEAT, measure, now + BEAT)

        self._beat = loop.call_later(BEAT, measure, loop.time() + BEAT)

    def close(self) -> None:
        """Stop measuring. Idempotent."""
        if self._beat is not None:
            self._beat.cancel()

    # Events.

    def connection_opened(self) -> None:
        """Count a WebSocket connection that opened."""
        self._connections.labels("served").inc()
        self._open.inc()

    def connection_closed(self) -> None:
        """Count a WebSocket connection that closed."""
        self._open.dec()

    def stream_opened(self) -> None:
        """Count an HTTP response that begins to stream a reply."""
        self._streams_open.inc()

    def stream_closed(self, end: StreamEnd) -> None:
        """Count an HTTP response that streamed a reply and has ended."""
        self._streams_open.dec()
        self._streams_of(end).inc()

    def connection_refused(self, why: Refusal) -> None:
        """Count a handshake that was answered with an HTTP error."""
        self._connections.labels(why).inc()

    def reader_aborted(self, why: Aborted) -> None:
        """Count a connection that the server aborted."""
        self._aborted.labels(why).inc()

    def frame_refused(self, kind: str, code: Code) -> None:
        """Count a refused frame.

        Args:
            kind: type of the frame; ``none`` if the frame is unusable.
            code: error code of the refusal.
        """
        self._frames.labels(kind, code).inc()

    def pieces_merged(self, count: int) -> None:
        """Count pieces that were sent as one frame."""
        self._merged.inc(count)

    def generation_began(self) -> None:
        """Count a request to a model that began."""
        self._running.inc()

    def generation_ended(
        self,
        terminal: Terminal,
        *,
        model: str,
        dollars: float,
        seconds: float | None,
        first_token: float | None,
    ) -> None:
        """Count a reply that ended.

        Args:
            terminal: end of the reply.
            model: one of the models that the settings allow.
            dollars: cost of the reply.
            seconds: time since the request to the model; None without a request.
            first_token: seconds from the prompt to the first piece; None without a piece.
        """
        if isinstance(terminal, Done) and terminal.by is None:
            reason = terminal.reason if terminal.reason in REASONS else OTHER
            self._generations_of("done", reason).inc()
        elif isinstance(terminal, Done):
            self._generations_of("stopped", terminal.by).inc()
        else:
            self._generations_of("error", terminal.code).inc()
            if terminal.code in UPSTREAM:
                self._upstream.labels(terminal.code).inc()
        if seconds is not None:
            self._running.dec()
            self._duration.observe(seconds)
        if dollars:
            self._dollars_of(model).inc(dollars)
        if first_token is not None:
            self._first_token.observe(first_token)
        if (usage := terminal.usage) is not None:
            for kind, count in (
                ("input", usage.input_tokens),
                ("output", usage.output_tokens),
                ("cache_creation", usage.cache_creation_input_tokens),
                ("cache_read", usage.cache_read_input_tokens),
            ):
                if count:
                    self._tokens_of(kind, model).inc(count)

    def stop_took(self, seconds: float) -> None:
        """Record the time from a stop until the model closed its request."""
        self._stop.observe(seconds)

    def commit_took(self, seconds: float, *, saved: bool) -> None:
        """Record the time of the store for a batch, and whether the batch was saved."""
        self._commit.observe(seconds)
        if not saved:
            self._commits_failed.inc()


class Span:
    """The span of one generation. It does nothing without OpenTelemetry.

    See https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ for its attributes.
    """

    __slots__ = ("_span",)

    def __init__(self, inner: "trace.Span | None") -> None:
        self._span = inner

    def context(self) -> contextvars.Context:
        """Return a context in which the span is current. Spans made there become its children."""
        context = contextvars.copy_context()
        if self._span is not None:
            context.run(attach, trace.set_span_in_context(self._span))
        return context

    def end(self, terminal: Terminal, first_token: float | None) -> None:
        """End the span.

        Args:
            terminal: end of the generation.
            first_token: seconds from the prompt to the first piece; None without a piece.
        """
        if self._span is None:
            return
        with _log_exceptions():
            if self._span.is_recording():
                self._set_attributes(self._span, terminal, first_token)
            self._span.end()

    @staticmethod
    def _set_attributes(span: "trace.Span", terminal: Terminal, first_token: float | None) -> None:
        if (usage := terminal.usage) is not None:
            created = usage.cache_creation_input_tokens
            read = usage.cache_read_input_tokens
            # By convention `input_tokens` includes the cached tokens. In our frames it does not.
            span.set_attribute("gen_ai.usage.input_tokens", usage.input_tokens + created + read)
            span.set_attribute("gen_ai.usage.output_tokens", usage.output_tokens)
            span.set_attribute("gen_ai.usage.cache_creation.input_tokens", created)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", read)
        if first_token is not None:
            span.set_attribute("wsserver.time_to_first_token", first_token)
        if not isinstance(terminal, Done):
            span.set_attribute("error.type", terminal.code)
            span.set_attribute("wsserver.ref", terminal.ref)
            span.set_status(trace.StatusCode.ERROR)
        elif terminal.by is not None:
            span.set_attribute("wsserver.stopped_by", terminal.by)
        else:
            span.set_attribute("gen_ai.response.finish_reasons", [terminal.reason])


class RequestSpan:
    """The span of one HTTP request to a model's API, a child of the current span.

    It does nothing if the current span is not recorded.

    See https://opentelemetry.io/docs/specs/semconv/http/http-spans/ for its attributes.

    Args:
        host: name or address of the server.
        port: its port.
        url: the URL, without credentials.
        resent: number of requests for the same reply before this one.
    """

    __slots__ = ("_span", "_status")

    def __init__(self, host: str, port: int, url: str, resent: int) -> None:
        self._span: trace.Span | None = None
        self._status = 0
        if not (TRACING and trace.get_current_span().is_recording()):
            return
        attributes: dict[str, str | int] = {
            "http.request.method": "POST",
            "server.address": host,
            "server.port": port,
            "url.full": url,
        }
        if resent:
            attributes["http.request.resend_count"] = resent
        with _log_exceptions():
            tracer = trace.get_tracer("wsserver")
            self._span = tracer.start_span(
                "POST", kind=trace.SpanKind.CLIENT, attributes=attributes
            )

    def on_status(self, status: int) -> None:
        """Record the status code of the response."""
        self._status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._span is None:
            return
        with _log_exceptions():
            if self._status:
                self._span.set_attribute("http.response.status_code", self._status)
            if kind is not None and issubclass(kind, WsserverError):
                failed = self._status >= HTTPStatus.BAD_REQUEST
                self._span.set_attribute(
                    "error.type", str(self._status) if failed else kind.__name__
                )
                self._span.set_status(trace.StatusCode.ERROR)
            self._span.end()


def span(
    *,
    generation: str,
    conversation: str | None,
    provider: str,
    model: str,
    max_tokens: int,
    temperature: float | None,
) -> Span:
    """Start the span of a generation. The arguments become attributes of the span."""
    if not TRACING or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return Span(None)  # no program has configured OpenTelemetry
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": max_tokens,
        "wsserver.generation.id": generation,
    }
    if temperature is not None:
        attributes["gen_ai.request.temperature"] = temperature
    if conversation is not None:
        attributes["gen_ai.conversation.id"] = conversation
    # An empty context makes a new trace. Otherwise the parent could be the span of an earlier
    # generation whose end started this one.
    name, kind = f"chat {model}", trace.SpanKind.CLIENT
    with _log_exceptions():
        tracer = trace.get_tracer("wsserver")
        inner = tracer.start_span(name, Context(), kind=kind, attributes=attributes)
        if inner.get_span_context().is_valid:  # invalid if no program has configured OpenTelemetry
            return Span(inner)
    return Span(None)


@contextlib.contextmanager
def _log_exceptions() -> Iterator[None]:
    """Log an exception of the program's span processor, which must not end a generation."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        log.error("span failed", failure=error)
