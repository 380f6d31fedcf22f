"""Claude, through Anthropic's SDK: one streaming request to the Messages API per reply.

The only module that knows the SDK. It takes the SDK's request and authentication, and reads the
body itself: building a model object per event would cost more than all else that a token needs.
Attempts are made again here and not in the SDK, which would sleep for as long as a ``retry-after``
says.

The stream's format: https://platform.claude.com/docs/en/build-with-claude/streaming
"""

import asyncio
import contextlib
import email.utils
import itertools
import json
import random
import re
import ssl
import time
from time import monotonic
from typing import Any

import anthropic
import httpx2
from pydantic_core import from_json

from wsserver.content import Usage
from wsserver.errors import Code, ConfigError, ModelError
from wsserver.generation import End, Thinking, tokens_in
from wsserver.logs import log
from wsserver.models.base import Request, Take
from wsserver.models.http import Body, Redirected, Transport
from wsserver.settings import Settings
from wsserver.telemetry import recording

__all__ = ["Anthropic"]

MAX_EVENT = 1 << 20  # bytes of one event; a longer one is no event of this API
MAX_PAUSE = 8.0  # seconds between attempts where the API does not say
LOOK_BACK = 20  # blocks at which the API looks for what is cached, the breakpoint's included
THINKING_RATE = 60  # tokens a second, about what the API's models say
LEAST_CACHED = 1024  # tokens; the API caches nothing shorter
HIGHEST_TEMPERATURE = 1  # that the API takes
LAST_READ = 1.0  # seconds for the end of the body, after which its connection is not used again

_BY_STATUS = {
    400: Code.BAD_REQUEST,
    401: Code.CREDENTIALS,
    402: Code.SPEND_LIMIT,
    403: Code.CREDENTIALS,
    404: Code.MODEL_NOT_FOUND,
    408: Code.TIMEOUT,
    413: Code.REQUEST_TOO_LARGE,
    429: Code.RATE_LIMITED,
    503: Code.OVERLOADED,
    504: Code.TIMEOUT,
    529: Code.OVERLOADED,
}
_BY_TYPE = {  # of an `error` event mid-stream, whose status is 200
    "authentication_error": Code.CREDENTIALS,
    "billing_error": Code.SPEND_LIMIT,
    "invalid_request_error": Code.BAD_REQUEST,
    "not_found_error": Code.MODEL_NOT_FOUND,
    "overloaded_error": Code.OVERLOADED,
    "permission_error": Code.CREDENTIALS,
    "rate_limit_error": Code.RATE_LIMITED,
    "request_too_large": Code.REQUEST_TOO_LARGE,
    "timeout_error": Code.TIMEOUT,
}
_CACHED = {"type": "ephemeral"}
_BAD_REQUEST = 400
_SERVER_ERROR = 500
_THINKING_BLOCKS = ("thinking", "redacted_thinking")
_SSE_FIELDS = (b"event", b"data", b"id", b"retry", b"")  # b"" begins a comment

# What the API says of more than a model takes: of messages alone, or of them and `max_tokens`.
_TOO_LONG = re.compile(r"(prompt|input) is too long|exceeds? (the )?context", re.IGNORECASE)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# Nearly all that a reply consists of looks like this. To know it by its looks takes a fifth of the
# time that it takes to read it as an event and as JSON; what looks different goes the long way.
_PLAIN_TEXT = re.compile(
    rb"event: content_block_delta\n"
    rb'data: \{"type": ?"content_block_delta", ?"index": ?\d+, ?'
    rb'"delta": ?\{"type": ?"text_delta", ?"text": ?"([^"\\\x00-\x1f]*)"\} *\}'
)


class _Transient(Exception):
    """An attempt failed in a way that the next one may not."""

    def __init__(self, error: ModelError) -> None:
        self.error = error


class _HttpClient(anthropic.DefaultAioHttpClient):
    """The SDK's, with its redirects and the environment's proxies, over transports of ours."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        super().__init__()

    def _init_transport(self, *_: Any, **__: Any) -> Transport:
        return Transport(self._connections)

    def _init_proxy_transport(self, proxy: httpx2.Proxy, *_: Any, **__: Any) -> Transport:
        return Transport(self._connections, proxy)


class Anthropic:
    """A model of Anthropic's, or of any server that speaks the Messages API.

    One HTTP client serves all replies; :meth:`aclose` closes it. Credentials,
    ``ANTHROPIC_BASE_URL`` and whatever else the SDK reads from the environment are honoured.

    Raises:
        ConfigError: there are no credentials.
    """

    provider = "anthropic"

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._settings = settings
        self._without_temperature: set[str] = set()  # models that refused one
        # A pool wait counts as connecting: the pool is as large as what may run at once. Silence is
        # measured by who asks for the reply, and not at each read once more.
        timeout = httpx2.Timeout(
            None, connect=settings.connect_timeout, pool=settings.connect_timeout
        )
        try:
            client = anthropic.AsyncAnthropic(
                max_retries=0,
                timeout=timeout,
                http_client=_HttpClient(settings.generations),
            )
        except anthropic.AnthropicError as error:  # its profile on disk is broken
            raise ConfigError(f"model: {name}: {error}") from error
        # Nothing that is said is for traces, whatever the environment says.
        traces = client.open_telemetry["traces"] | {"content_mode": "metadata_only"}
        self._client = client.with_options(
            open_telemetry={**client.open_telemetry, "traces": traces}
        )
        if not (self._client.auth_headers or self._client.credentials):
            raise ConfigError(
                f"model: {name} needs Anthropic credentials; set ANTHROPIC_API_KEY, "
                "or try --model demo"
            )

    async def aclose(self) -> None:
        """Close the HTTP client and the connections that it holds."""
        await self._client.close()

    async def push(self, request: Request, take: Take, /) -> None:
        """Stream a reply, with new attempts while nothing of it has come yet.

        Raises:
            ModelError: it failed; see the codes in :mod:`wsserver.errors`.
        """
        arguments = self._arguments(request)
        budget = self._settings.retry_budget
        for attempt in range(self._settings.retries + 1):
            reply = _Reply(take, request.max_tokens)
            try:
                await self._attempt(arguments, reply)
            except _Transient as failure:
                error = failure.error
                pause = error.retry_after
                if pause is None:
                    # Full jitter, so that those who failed together do not come back together.
                    pause = random.uniform(0, min(MAX_PAUSE, 0.5 * 2**attempt))  # noqa: S311
                longest = min(budget, self._settings.silence_timeout)
                if reply.begun or attempt == self._settings.retries or pause > longest:
                    raise error from failure.__cause__
                log.debug("attempt failed", model=request.model, code=error.code, pause=pause)
                budget -= pause
                take("")  # a new attempt has its own time to be silent
                await asyncio.sleep(pause)
                take("")
            else:
                return

    def _arguments(self, request: Request) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [
            {"role": message.role, "content": message.content} for message in request.messages
        ]
        arguments: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.max_tokens,
            "messages": messages,
        }
        if request.system:
            arguments["system"] = request.system
        if self._settings.prompt_caching:
            _mark(arguments)
        thinking = self._settings.thinking
        if thinking == "adaptive":
            arguments["thinking"] = {"type": "adaptive", "display": "summarized"}
        elif thinking == "disabled":
            arguments["thinking"] = {"type": "disabled"}
        elif thinking and int(thinking) < request.max_tokens:  # as the API demands
            arguments["thinking"] = {"type": "enabled", "budget_tokens": int(thinking)}
        # While a model thinks, the API takes no other temperature than its default.
        thinks = arguments.get("thinking", {}).get("type") in {"enabled", "adaptive"}
        takes_one = not thinks and request.model not in self._without_temperature
        if request.temperature is not None and takes_one:
            arguments["extra_body"] = {"temperature": request.temperature}  # the SDK has none
        return arguments

    def _without(self, error: anthropic.APIStatusError, arguments: dict[str, Any]) -> bool:
        """Leave out a temperature that the model takes none of, and say whether that was it.

        Raises:
            ModelError: the model takes a temperature, but not so high a one.
        """
        temperature = arguments.get("extra_body", {}).get("temperature")
        if temperature is None or "temperature" not in _message(error):
            return False
        if temperature > HIGHEST_TEMPERATURE:
            failure = ModelError(Code.BAD_REQUEST, "temperature: the model's API refused it.")
            failure.kind = _kind(error.type)
            raise failure from error
        self._without_temperature.add(arguments["model"])
        del arguments["extra_body"]
        return True

    async def _attempt(self, arguments: dict[str, Any], reply: "_Reply") -> None:
        create = self._client.messages.with_raw_response.create
        try:
            response = (await create(**arguments, stream=True)).http_response
            body: Body = response.extensions["body"]
            events = response.headers.get("content-type", "").startswith("text/event-stream")
            # The SDK's span ends with its response. Where nobody keeps spans the body alone is held
            # on to, as the rest would take 10 KiB for as long as the reply takes.
            held = response if recording() else body
            del response
            try:
                if not events:
                    raise ModelError(Code.MALFORMED)
                await body.pour(reply.feed)
                end = reply.end()
                # Read on to the end of the body, so that its connection can serve the next reply.
                with contextlib.suppress(TimeoutError, httpx2.TransportError):
                    async with asyncio.timeout(LAST_READ):
                        await body.pour(_ignore)
            finally:
                reply.close()
                await held.aclose()
            reply.take(end)
        except anthropic.APIStatusError as error:
            if not self._without(error, arguments):
                raise _of_status(error) from error
            await self._attempt(arguments, reply)
        except anthropic.APIConnectionError as error:
            raise _of_connection(error) from error
        except anthropic.CredentialsError as error:
            raise ModelError(Code.CREDENTIALS) from error
        except httpx2.DecodingError as error:
            raise ModelError(Code.MALFORMED) from error
        except httpx2.TransportError as error:
            raise _Transient(ModelError(Code.INCOMPLETE)) from error


def _mark(arguments: dict[str, Any]) -> None:
    """Place the breakpoints of the prompt cache.

    The API writes the cache at each breakpoint, and reads it at a breakpoint or at one of the 20
    blocks up to it. The breakpoint at the end finds what the request before wrote, unless many
    prompts without a reply are between: their requests may have ended before they wrote anything.
    Then there is one where the last request ended that had a reply. A long system prompt has its
    own, for other conversations.
    """
    arguments["cache_control"] = _CACHED
    if tokens_in(system := arguments.get("system", "")) >= LEAST_CACHED:
        arguments["system"] = [{"type": "text", "text": system, "cache_control": _CACHED}]
    messages = arguments["messages"]
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    asked = replies[-1] - 1 if replies else -1
    if 0 <= asked < len(messages) - LOOK_BACK:
        text = messages[asked]["content"]
        messages[asked]["content"] = [{"type": "text", "text": text, "cache_control": _CACHED}]


def _ignore(_: bytes) -> bool:
    return False


class _Events:
    """Cuts a byte stream into server-sent events.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation,
    but for one rule: a field that the API never sends is an error and not ignored, as text that
    a damaged line carried would be lost in silence.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return each event that the chunk completes, with LF between its lines.

        Raises:
            ModelError: it is not a stream of events.
        """
        buffer = self._rest + chunk
        held = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):  # half of a line end perhaps
                buffer, held = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, rest = buffer.split(b"\n\n")
        self._rest = rest + held
        if len(self._rest) > MAX_EVENT:
            raise ModelError(Code.MALFORMED)
        return events

    @staticmethod
    def data(event: bytes) -> bytes:
        """Return the data of an event, which is empty where it has none.

        Raises:
            ModelError: it is no event.
        """
        data = []
        for line in event.split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif field not in _SSE_FIELDS:
                raise ModelError(Code.MALFORMED)
        return b"\n".join(data)


class _Reply:
    """Follows the events of one reply; text that arrives in one read becomes one piece.

    Args:
        take: what is given the pieces.
        limit: output tokens at most.

    Attributes:
        take: what is given the pieces.
        begun: whether there was any text.
    """

    def __init__(self, take: Take, limit: int) -> None:
        self.take = take
        self.begun = False
        self._limit = limit
        self._thinking_since: float | None = None
        self._thought = 0.0  # seconds
        self._events = _Events()
        self._end: End | None = None
        self._usage = Usage(estimated=True)
        self._stop_reason: object = None
        self._found: list[str | Usage] = []

    def feed(self, chunk: bytes) -> bool:
        """Take what arrived in one read, and say whether the reply is complete.

        Raises:
            ModelError: an event is an error, or none of this API's, or tells of a refusal.
        """
        try:
            for event in self._events.feed(chunk):
                if self._end is not None:  # it is complete, whatever else was sent
                    break
                if (plain := _PLAIN_TEXT.fullmatch(event)) is not None:
                    self._found.append(plain[1].decode())
                elif data := _Events.data(event):
                    self._receive(data)
        except UnicodeDecodeError as error:
            raise ModelError(Code.MALFORMED) from error
        finally:  # before a failure, all that came before it is said
            self._say()
        return self._end is not None

    def end(self) -> End:
        """Return how the reply ended.

        Raises:
            _Transient: the body ended before the reply did, as one that is cut does.
        """
        if self._end is None:
            raise _Transient(ModelError(Code.INCOMPLETE))
        return self._end

    def close(self) -> None:
        """Say what a reply has likely used so far, if it ends before the API counts.

        The API shows a summary of the thinking, or nothing of it, and bills all of it: until it
        tells the count, the time is what there is to go by.
        """
        self._think_no_more()
        if self._thought and self._usage.estimated:
            tokens = min(round(self._thought * THINKING_RATE), self._limit)
            self.take(self._usage.but(thinking_tokens=tokens))

    def _think_no_more(self) -> None:
        if self._thinking_since is not None:
            self._thought += monotonic() - self._thinking_since
            self._thinking_since = None

    def _receive(self, data: bytes) -> None:
        try:
            event = _json(data)
            match event["type"]:
                case "content_block_delta":
                    self._delta(event["delta"])
                case "content_block_start":
                    block = event["content_block"]
                    if block.get("type") in _THINKING_BLOCKS:
                        self._thinking_since = monotonic()
                    self._found.append(_text(block.get("text") or ""))
                case "content_block_stop":
                    self._think_no_more()
                case "message_start":
                    self._count(event["message"].get("usage") or {}, estimated=True)
                case "message_delta":
                    self._stop_reason = event["delta"].get("stop_reason") or self._stop_reason
                    self._count(event.get("usage") or {}, estimated=False)
                case "message_stop":
                    self._stop()
                case "error":
                    raise _of_event(event["error"])
                case _:  # a `ping`, or an event of a later version, which the API says to ignore
                    pass
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ModelError(Code.MALFORMED) from error

    def _delta(self, delta: dict[str, Any]) -> None:
        match delta["type"]:
            case "text_delta":
                self._found.append(_text(delta["text"]))
            case "thinking_delta":
                self._found.append(Thinking(_text(delta["thinking"])))
            case _:  # signatures, citations and a tool's input are not shown, but are life
                self._found.append("")

    def _say(self) -> None:
        """Hand on what was found, neighbouring text of one kind as one piece."""
        found, self._found = self._found, []
        for kind, pieces in itertools.groupby(found, type):
            if kind is Usage:
                for usage in pieces:
                    self.take(usage)
            else:
                text = "".join(pieces)  # type: ignore[arg-type]
                self.begun = self.begun or text != ""
                self.take(kind(text))

    def _count(self, counts: dict[str, Any], *, estimated: bool) -> None:
        # The counts of `message_delta` are totals, and it leaves out what has not changed.
        known = {
            name: int(counts[name])
            for name in (
                "input_tokens",
                "output_tokens",
                "cache_creation_input_tokens",
                "cache_read_input_tokens",
            )
            if counts.get(name) is not None
        }
        self._usage = self._usage.but(**known, estimated=estimated)
        self._found.append(self._usage)

    def _stop(self) -> None:
        if self._stop_reason is None:
            raise _Transient(ModelError(Code.INCOMPLETE))
        if not isinstance(self._stop_reason, str):
            raise TypeError("a reason that is none")
        if self._stop_reason == "refusal":
            raise ModelError(Code.REFUSAL)
        self._end = End(self._stop_reason, self._usage)


def _json(data: bytes) -> Any:
    r"""Parse JSON, also where an escape such as ``\ud83d`` is half of a surrogate pair.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return from_json(data)
    except ValueError:
        if not _SURROGATE.search(data):
            raise
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError("text that is none")
    return text


def _message(error: anthropic.APIStatusError) -> str:
    """Return what the API says of a bad request. It may quote the prompt and is not for the log."""
    body = error.body
    cause = body.get("error") if isinstance(body, dict) else None
    message = cause.get("message") if isinstance(cause, dict) else None
    return str(message) if error.status_code == _BAD_REQUEST else ""


def _of_status(error: anthropic.APIStatusError) -> Exception:
    code = _BY_STATUS.get(error.status_code)
    if _TOO_LONG.search(_message(error)):
        code = Code.PROMPT_TOO_LONG
    if code is None:
        server = error.status_code >= _SERVER_ERROR
        code = Code.UPSTREAM_ERROR if server else Code.BAD_REQUEST
    if error.type == "billing_error" or (error.error_code or "").endswith("spend_limit_reached"):
        code = Code.SPEND_LIMIT
    headers = error.response.headers
    model_error = ModelError(code, retry_after=_retry_after(headers) if code.retryable else None)
    model_error.kind = _kind(error.type)
    if code.retryable and headers.get("x-should-retry") != "false":
        return _Transient(model_error)
    return model_error


def _of_connection(error: anthropic.APIConnectionError) -> Exception:
    if isinstance(error, anthropic.APITimeoutError):
        return _Transient(ModelError(Code.TIMEOUT))
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ModelError(Code.UNTRUSTED)
        if isinstance(cause, Redirected | httpx2.TooManyRedirects):
            return ModelError(Code.REDIRECTED)
        if isinstance(cause, httpx2.RemoteProtocolError):
            return ModelError(Code.MALFORMED)
        cause = cause.__cause__ or cause.__context__
    return _Transient(ModelError(Code.UNREACHABLE))


def _of_event(error: dict[str, Any]) -> Exception:
    code = _BY_TYPE.get(error["type"], Code.UPSTREAM_ERROR)
    if code is Code.BAD_REQUEST and _TOO_LONG.search(str(error.get("message"))):
        code = Code.PROMPT_TOO_LONG
    details = error.get("details") or {}
    if str(details.get("error_code")).endswith("spend_limit_reached"):
        code = Code.SPEND_LIMIT
    model_error = ModelError(code)
    model_error.kind = _kind(error["type"])
    return _Transient(model_error) if code.retryable else model_error


def _kind(kind: object) -> str | None:
    """Return the type of an error where it is a word, as all of the API's are."""
    return kind if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,64}", kind) else None


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Read how long to wait, in seconds (RFC 9110 section 10.2.3; in milliseconds by custom)."""
    for name, scale in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(ValueError, OverflowError):
            seconds = float(headers.get(name, "")) / scale
            if 0 <= seconds < float("inf"):
                return seconds
    with contextlib.suppress(KeyError, ValueError):
        when = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(0.0, when.timestamp() - time.time())
    return None
