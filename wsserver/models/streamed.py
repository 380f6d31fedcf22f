"""A model behind an HTTP API that streams replies: one request per attempt, and the retries."""

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic_core import to_json

from wsserver.content import Usage
from wsserver.errors import Code, ModelError
from wsserver.logs import log
from wsserver.models.base import Request, Take
from wsserver.models.events import parse
from wsserver.models.failures import ApiError, TransientError, of_http
from wsserver.models.http import Pool, Template
from wsserver.models.reply import Reply
from wsserver.models.response import HttpError, Response
from wsserver.settings import Settings
from wsserver.telemetry import RequestSpan

MAX_PAUSE = 8.0  # seconds between attempts without a `retry-after`
RETRY_BUDGET = 15.0  # seconds of all pauses together; for longer pauses the client retries itself
MAX_ERROR = 65_536  # bytes of an error's body

_OK = 200
_UNAUTHORIZED = 401


class Source(Protocol):
    """Makes the URL and the headers of requests.

    Attributes:
        renewable: whether the credentials can be renewed.
    """

    @property
    def renewable(self) -> bool: ...  # noqa: D102

    def tls(self) -> ssl.SSLContext:
        """Return the TLS context. A template must exist."""
        ...

    async def current(self, refused: Template | None = None) -> Template:
        """Return the template for a request.

        Args:
            refused: a template with credentials that the API refused.

        Raises:
            ConfigError: the environment is misconfigured.
            ModelError: there are no valid credentials.
            TransientError: the credentials cannot be had now.
        """
        ...

    async def aclose(self) -> None:
        """Close what the source holds."""
        ...


class StreamedModel:
    """A model behind an API. A subclass knows the API: its bodies, its events and its errors.

    Args:
        name: the model, as the API names it.
        settings: timeouts and retries.
        source: the URL and the headers.
    """

    writes_titles = True

    def __init__(self, name: str, settings: Settings, source: Source) -> None:
        self.name = name
        self.settings = settings
        self._source = source
        self._pool = Pool(settings.generations, settings.connect_timeout, source.tls)

    def make_body(self, request: Request) -> dict[str, Any]:
        """Make the body of the request for a reply, which is JSON."""
        raise NotImplementedError

    def make_reply(self, take: Take, limit: int, spent: Usage | None) -> Reply:
        """Make the parser of a response; see :class:`Reply`."""
        raise NotImplementedError

    def make_error(self, status: int, headers: Mapping[str, str], body: object) -> ApiError:
        """Make an error from a response; ``body`` is None if it is not JSON."""
        raise NotImplementedError

    def adapt(self, body: dict[str, Any], error: ApiError) -> bool:
        """Change a body that the API refused so that the API accepts it.

        Returns:
            Whether anything changed, so that the request can be repeated at once.

        Raises:
            ModelError: the client has to change its prompt.
        """
        raise NotImplementedError

    async def warm(self) -> None:
        """Open a connection to the API, if none is idle. The next prompt reports its own error.

        Raises:
            ConfigError: the environment is misconfigured.
        """
        with contextlib.suppress(ModelError, TransientError):
            template = await self._source.current()
            await self._pool.warm(template.origin)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()
        await self._source.aclose()

    async def push(self, request: Request, take: Take, /) -> None:
        """Stream a reply. Repeat a failed attempt if it failed before the first text.

        Raises:
            ModelError: the reply failed; see the codes in :mod:`wsserver.errors`.
        """
        body = self.make_body(request)
        budget = RETRY_BUDGET
        spent: Usage | None = None
        for attempt in range(self.settings.retries + 1):
            reply = self.make_reply(take, request.max_tokens, spent)
            try:
                await self._attempt(body, reply, attempt)
            except TransientError as failure:
                error = failure.error
                pause = error.retry_after
                if pause is None:
                    # Full jitter: requests that failed together are not repeated together.
                    pause = random.uniform(0, min(MAX_PAUSE, 0.5 * 2**attempt))  # noqa: S311
                longest = min(budget, self.settings.silence_timeout)
                if reply.begun or attempt == self.settings.retries or pause > longest:
                    raise error from failure.__cause__
                log.debug("attempt failed", model=request.model, code=error.code, pause=pause)
                budget -= pause
                spent = reply.spent
                take("")  # an empty text ends the silence: each attempt has the whole time limit
                await asyncio.sleep(pause)
                take("")
            else:
                return

    async def _attempt(self, body: dict[str, Any], reply: Reply, resent: int) -> None:
        """Make one attempt. Repeat it at once with renewed credentials or an adapted body.

        Raises:
            ModelError: the attempt failed.
            TransientError: the attempt failed, and the next one may succeed.
        """
        refused: Template | None = None
        while True:
            try:
                template = await self._source.current(refused)
                origin = template.origin
                with RequestSpan(origin.host, origin.port, template.url, resent) as span:
                    await self._exchange(template, to_json(body), reply, span)
            except HttpError as error:
                raise of_http(error, template.url) from error
            except ApiError as error:
                resent += 1
                if error.status == _UNAUTHORIZED and refused is None and self._source.renewable:
                    refused = template
                elif not self.adapt(body, error):
                    raise error.failure() from error
            else:
                return

    async def _exchange(
        self, template: Template, body: bytes, reply: Reply, span: RequestSpan
    ) -> None:
        def accept(response: Response) -> Callable[[bytes], bool] | None:
            return reply.feed if _is_stream(response) else None

        response = await self._pool.post(template, body, accept)
        del body  # otherwise this frame would keep it for as long as the reply lasts
        try:
            span.on_status(response.status)
            if response.status != _OK:
                raise await self._error(response)
            if not _is_stream(response):
                # Some servers answer with the status 200 and an error as JSON.
                with contextlib.suppress(LookupError, ValueError, TypeError, AttributeError):
                    reply.receive(await self._read_json(response))
                raise ModelError(Code.MALFORMED)
            response.headers.clear()
            try:
                await response.read_body(reply.feed)
                end = reply.finish()
            finally:
                reply.close()
            response.release()  # `done` does not wait for the end of the body
        finally:
            await response.aclose()
        reply.take(end)

    async def _error(self, response: Response) -> ApiError:
        """Return the error of a response."""
        body = await self._read_json(response)
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers
        }
        return self.make_error(response.status, headers, body)

    async def _read_json(self, response: Response) -> object:
        """Return the body of a response; None if it is not JSON or too long."""
        body = bytearray()

        def take(data: bytes) -> bool:
            body.extend(data)
            return len(body) > MAX_ERROR

        with contextlib.suppress(HttpError, ValueError):
            await response.read_body(take)
            return parse(bytes(body))
        return None


def _is_stream(response: Response) -> bool:
    """Whether a response is a stream of events."""
    kind = response.header(b"content-type") or b""
    return response.status == _OK and kind.startswith(b"text/event-stream")
