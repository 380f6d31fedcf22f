"""What an operator sees of a running server: numbers for Prometheus, spans for OpenTelemetry.

The one module that knows either library. Every label has a bounded set of values, whatever clients
and models say. What is counted is counted at the ends of things, so that a token costs nothing.
Spans are made where OpenTelemetry is installed, and cost next to nothing where no program has set
it up; neither prompts nor replies are in them.
"""

import asyncio
import contextlib
import contextvars
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

__all__ = ["Aborted", "Metrics", "Refusal", "RequestSpan", "Span", "span"]

Refusal = Literal["host", "origin", "unauthenticated", "limit", "unavailable"]
"""Why a connection was not served."""
Aborted = Literal["too much unsent", "does not read"]
"""Why a connection was cut by us."""

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
OTHER = "other"  # the reason of a model that has reasons of its own

BEAT = 1.0  # seconds between two looks at how late the event loop is

# Seconds. The upper bounds are the defaults of what the settings limit.
_TO_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60)
_REPLY = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_STOP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_COMMIT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """The numbers of one server, in a registry of its own, as there may be several in a process."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4
    """Of what :meth:`exposition` returns."""

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

        self._open = gauge("connections_open", "WebSockets that are open.")
        self._connections = counter(
            "connections_total", "WebSockets served, and refused for what reason.", "outcome"
        )
        self._memory = gauge("memory_bytes", "Bytes that are kept for clients, of the `memory`.")
        self._running = gauge("generations_running", "Replies that a model is being asked for.")
        self._generations = counter(
            "generations_total",
            "Replies that ended: done with which reason, stopped by whom, or which error.",
            "outcome",
            "why",
        )
        self._first_token = histogram(
            "time_to_first_token", "From a prompt to the first piece.", _TO_FIRST_TOKEN
        )
        self._duration = histogram(
            "generation_duration", "From asking a model to the end of its reply.", _REPLY
        )
        self._tokens = counter(
            "tokens_total", "Tokens that models said they used, or likely did.", "kind", "model"
        )
        self._dollars = counter(
            "dollars_total", "What replies have cost, by the prices in the settings.", "model"
        )
        self._stop = histogram(
            "stop_latency", "From a stop to the model's request being closed.", _STOP
        )
        self._upstream = counter(
            "upstream_errors_total", "Replies that failed for the model's API.", "code"
        )
        self._merged = counter(
            "pieces_merged_total", "Pieces that readers got merged with others into one frame."
        )
        self._aborted = counter(
            "readers_aborted_total", "Connections cut as they read too little.", "why"
        )
        self._lag = histogram("event_loop_lag", "How late a timer fires, once a second.", _LAG)
        self._commit = histogram("store_commit", "The store's time for a batch.", _COMMIT)
        self._commits_failed = counter(
            "store_commits_failed_total", "Batches that the store could not save."
        )
        self._frames = counter(
            "frames_refused_total", "Frames refused, prompts among them.", "type", "code"
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Make what may happen visible before it has happened, so that its rate is right."""
        for outcome in ("served", *get_args(Refusal)):
            self._connections.labels(outcome)
        for reason in (*REASONS, OTHER):
            self._generations.labels("done", reason)
        for by in get_args(StoppedBy):
            self._generations.labels("stopped", by)
        for code in (*UPSTREAM, Code.INTERNAL):
            self._generations.labels("error", code)
        for code in UPSTREAM:
            self._upstream.labels(code)
        for why in get_args(Aborted):
            self._aborted.labels(why)

    def exposition(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def watch_memory(self, memory: Memory) -> None:
        """Show how much of a memory is used, whenever somebody asks."""
        self._memory.set_function(lambda: memory.used)

    def watch_loop(self) -> None:
        """Measure how late the running event loop is, until :meth:`close`."""
        loop = asyncio.get_running_loop()

        def look(due: float) -> None:
            now = loop.time()
            self._lag.observe(max(0.0, now - due))
            self._beat = loop.call_at(now + BEAT, look, now + BEAT)

        self._beat = loop.call_later(BEAT, look, loop.time() + BEAT)

    def close(self) -> None:
        """Measure no more. Idempotent."""
        if self._beat is not None:
            self._beat.cancel()

    # What happens.

    def connection_opened(self) -> None:
        """A WebSocket is served."""
        self._connections.labels("served").inc()
        self._open.inc()

    def connection_closed(self) -> None:
        """It is served no more."""
        self._open.dec()

    def connection_refused(self, why: Refusal) -> None:
        """A handshake was answered with an HTTP error."""
        self._connections.labels(why).inc()

    def reader_aborted(self, why: Aborted) -> None:
        """A connection was cut by us."""
        self._aborted.labels(why).inc()

    def frame_refused(self, kind: str, code: Code) -> None:
        """A frame was refused.

        Args:
            kind: the type of the frame; ``none`` where it is unusable.
            code: why.
        """
        self._frames.labels(kind, code).inc()

    def pieces_merged(self, count: int) -> None:
        """A reader got so many pieces as one frame."""
        self._merged.inc(count)

    def generation_began(self) -> None:
        """A model was asked."""
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
        """A reply is over.

        Args:
            terminal: how.
            model: of all those that the settings allow.
            dollars: what the reply has cost.
            seconds: since the model was asked; None if it never was.
            first_token: seconds from the prompt to the first piece; None if there was none.
        """
        if isinstance(terminal, Done) and terminal.by is None:
            reason = terminal.reason if terminal.reason in REASONS else OTHER
            self._generations.labels("done", reason).inc()
        elif isinstance(terminal, Done):
            self._generations.labels("stopped", terminal.by).inc()
        else:
            self._generations.labels("error", terminal.code).inc()
            if terminal.code in UPSTREAM:
                self._upstream.labels(terminal.code).inc()
        if seconds is not None:
            self._running.dec()
            self._duration.observe(seconds)
        if dollars:
            self._dollars.labels(model).inc(dollars)
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
                    self._tokens.labels(kind, model).inc(count)

    def stop_took(self, seconds: float) -> None:
        """A stopped model has closed its request, so long after it was asked to."""
        self._stop.observe(seconds)

    def commit_took(self, seconds: float, *, saved: bool) -> None:
        """The store has saved a batch, or has failed to."""
        self._commit.observe(seconds)
        if not saved:
            self._commits_failed.inc()


class Span:
    """One generation in a trace; nothing at all without OpenTelemetry.

    See https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ for its attributes.
    """

    __slots__ = ("_span",)

    def __init__(self, inner: "trace.Span | None") -> None:
        self._span = inner

    def context(self) -> contextvars.Context:
        """Return a context in which the span is current, so that libraries' spans belong to it."""
        context = contextvars.copy_context()
        if self._span is not None:
            context.run(attach, trace.set_span_in_context(self._span))
        return context

    def end(self, terminal: Terminal, first_token: float | None) -> None:
        """Say how the generation ended.

        Args:
            terminal: how.
            first_token: seconds from the prompt to the first piece, if there was one.
        """
        if self._span is None:
            return
        with _firewall():
            if self._span.is_recording():
                self._tell(self._span, terminal, first_token)
            self._span.end()

    @staticmethod
    def _tell(span: "trace.Span", terminal: Terminal, first_token: float | None) -> None:
        if (usage := terminal.usage) is not None:
            created = usage.cache_creation_input_tokens or 0
            read = usage.cache_read_input_tokens or 0
            # Here, and not in our frames, the cache's are a part of the whole.
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
    """One HTTP request to a model's API, as a part of the current span, if that is recorded.

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
        with _firewall():
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
        with _firewall():
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
    """Begin the span of a generation; the arguments are what the model is asked, and for what."""
    if not TRACING:
        return Span(None)
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
    # A trace of its own: what is current where it begins may be another generation, whose end
    # lets this one begin.
    name, kind = f"chat {model}", trace.SpanKind.CLIENT
    with _firewall():
        tracer = trace.get_tracer("wsserver")
        inner = tracer.start_span(name, Context(), kind=kind, attributes=attributes)
        if inner.get_span_context().is_valid:  # else no program has set up OpenTelemetry
            return Span(inner)
    return Span(None)


@contextlib.contextmanager
def _firewall() -> Iterator[None]:
    """Log an exception of the program's own span processor, which must not end a generation."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        log.error("span failed", failure=error)
