"""The model: sends one streaming request per reply, and repeats failed attempts.

The SDK does not repeat attempts, because it would wait for any ``retry-after``, however long.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

from pydantic_core import to_json

from wsserver.content import Usage
from wsserver.errors import Code, ModelError
from wsserver.logs import log
from wsserver.models.anthropic.events import parse
from wsserver.models.anthropic.failures import ApiError, TransientError, of_http
from wsserver.models.anthropic.reply import Reply
from wsserver.models.anthropic.request import arguments
from wsserver.models.anthropic.templates import Templates
from wsserver.models.base import Request, Take
from wsserver.models.http import Pool, Template
from wsserver.models.response import HttpError, Response
from wsserver.settings import Settings
from wsserver.telemetry import RequestSpan

MAX_PAUSE = 8.0  # seconds between attempts without a `retry-after`
RETRY_BUDGET = 15.0  # seconds of all pauses together; for longer pauses the client retries itself
MAX_TEMPERATURE = 1  # that the API accepts
MAX_ERROR = 65_536  # bytes of an error's body

_OK = 200
_UNAUTHORIZED = 401


class Anthropic:
    """A Claude model, or any model of a server that speaks the Messages API.

    All settings that the SDK reads from the environment apply: credentials, ``ANTHROPIC_BASE_URL``
    and others.

    Raises:
        ConfigError: there are no credentials, or they cannot be used.
    """

    provider = "anthropic"

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._settings = settings
        self._without_temperature: set[str] = set()  # models that refused a temperature
        self._templates = Templates(name)
        self._pool = Pool(settings.generations, settings.connect_timeout, self._templates.tls)

    async def prepare(self) -> None:
        """Import the SDK.

        Raises:
            ConfigError: the SDK cannot be used as the environment configures it.
        """
        await self._templates.import_sdk()

    async def warm(self) -> None:
        """Open a connection to the API, if none is idle. The next prompt reports its own error.

        Raises:
            ConfigError: the SDK cannot be used as the environment configures it.
        """
        with contextlib.suppress(ModelError, TransientError):
            template = await self._templates.current()
            await self._pool.warm(template.origin)

    async def aclose(self) -> None:
        """Close all connections and the SDK."""
        await self._pool.aclose()
        await self._templates.aclose()

    async def push(self, request: Request, take: Take, /) -> None:
        """Stream a reply. Repeat a failed attempt if it failed before the first text.

        Raises:
            ModelError: the reply failed; see the codes in :mod:`wsserver.errors`.
        """
        takes_temperature = request.model not in self._without_temperature
        body = arguments(request, self._settings, takes_temperature=takes_temperature)
        budget = RETRY_BUDGET
        spent: Usage | None = None
        for attempt in range(self._settings.retries + 1):
            reply = Reply(take, request.max_tokens, spent)
            try:
                await self._attempt(body, reply, attempt)
            except TransientError as failure:
                error = failure.error
                pause = error.retry_after
                if pause is None:
                    # Full jitter: requests that failed together are not repeated together.
                    pause = random.uniform(0, min(MAX_PAUSE, 0.5 * 2**attempt))  # noqa: S311
                longest = min(budget, self._settings.silence_timeout)
                if reply.begun or attempt == self._settings.retries or pause > longest:
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
        """Make one attempt. Repeat it at once with renewed credentials or without a temperature.

        Raises:
            ModelError: the attempt failed.
            TransientError: the attempt failed, and the next one may succeed.
        """
        refused: Template | None = None
        while True:
            try:
                template = await self._templates.current(refused)
                origin = template.origin
                with RequestSpan(origin.host, origin.port, template.url, resent) as span:
                    await self._exchange(template, to_json(body), reply, span)
            except HttpError as error:
                raise of_http(error) from error
            except ApiError as error:
                resent += 1
                if error.status == _UNAUTHORIZED and refused is None and self._templates.renewable:
                    refused = template
                elif not self._leave_out_temperature(error, body):
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
                raise await _error(response)
            if not _is_stream(response):
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

    def _leave_out_temperature(self, error: ApiError, body: dict[str, Any]) -> bool:
        """Leave out the temperature if the model refused it; return whether it was left out.

        Raises:
            ModelError: the temperature is above the range of the model.
        """
        temperature = body.get("temperature")
        if temperature is None or "temperature" not in error.message:
            return False
        if temperature > MAX_TEMPERATURE:
            failure = ModelError(Code.BAD_REQUEST, "temperature: the model's API refused it.")
            error.identify(failure)
            raise failure from error
        self._without_temperature.add(body["model"])
        del body["temperature"]
        return True


def _is_stream(response: Response) -> bool:
    """Whether a response is a stream of events."""
    kind = response.header(b"content-type") or b""
    return response.status == _OK and kind.startswith(b"text/event-stream")


async def _error(response: Response) -> ApiError:
    """Return the error of a response. Its body may be anything."""
    body = bytearray()

    def take(data: bytes) -> bool:
        body.extend(data)
        return len(body) > MAX_ERROR

    parsed = None
    with contextlib.suppress(HttpError, ValueError):
        await response.read_body(take)
        parsed = parse(bytes(body))
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
    return ApiError(response.status, headers, parsed)
