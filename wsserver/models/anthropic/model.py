"""The model: one streaming request to the Messages API per reply, and new attempts after failures.

Attempts are repeated here and not by the SDK, which would sleep for as long as a ``retry-after``
says.
"""

import asyncio
import contextlib
import os
import random
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic_core import to_json

from wsserver.content import Usage
from wsserver.errors import Code, ConfigError, ModelError
from wsserver.logs import log
from wsserver.models.anthropic.events import parse
from wsserver.models.anthropic.failures import ApiError, TransientError, of_http
from wsserver.models.anthropic.reply import Reply
from wsserver.models.anthropic.request import arguments
from wsserver.models.base import Request, Take
from wsserver.models.http import PORTS, Pool, Template
from wsserver.models.response import HttpError, Response
from wsserver.settings import Settings
from wsserver.telemetry import RequestSpan

if TYPE_CHECKING:
    from wsserver.models.anthropic.sdk import Sdk

__all__ = ["Anthropic"]

MAX_PAUSE = 8.0  # seconds between attempts where the API does not say
MAX_TEMPERATURE = 1  # that the API accepts
MAX_ERROR = 65_536  # bytes of an error's body
TEMPLATE_TIME = 20.0  # seconds; the SDK gives out no token that expires within 30

_OK = 200
_UNAUTHORIZED = 401


class Anthropic:
    """A model of Anthropic's, or of any server that speaks the Messages API.

    Credentials, ``ANTHROPIC_BASE_URL`` and whatever else the SDK reads from the environment are
    honoured. The SDK takes most of a second to import. If the environment has a key or a token, a
    thread imports the SDK later: for :meth:`prepare`, or for the first prompt.

    Args:
        name: the id of the model.
        settings: time-outs and limits.

    Raises:
        ConfigError: there are no credentials, or they cannot be used.
    """

    provider = "anthropic"

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._settings = settings
        self._without_temperature: set[str] = set()  # models that refused one
        self._sdk: Sdk | None = None
        self._loading: asyncio.Task[Sdk] | None = None
        self._pool = Pool(settings.generations, settings.connect_timeout, self._tls)
        self._template: Template | None = None
        self._recorded = 0.0  # when, by the clock of the event loop
        self._recording: asyncio.Task[Template] | None = None
        if not _has_key():
            self._sdk = _load(name)

    async def prepare(self) -> None:
        """Import the SDK.

        Raises:
            ConfigError: the SDK cannot be used as the environment configures it.
        """
        await self._load_sdk()

    async def warm(self) -> None:
        """Have one connection to the API ready, if none is idle. Failures are left to prompts."""
        with contextlib.suppress(ConfigError, HttpError, ModelError, TransientError):
            template = await self._current_template()
            await self._pool.warm(template.origin)

    async def aclose(self) -> None:
        """Close all connections and the SDK."""
        for task in (self._loading, self._recording):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await self._pool.aclose()
        if self._sdk is not None:
            await self._sdk.aclose()

    async def push(self, request: Request, take: Take, /) -> None:
        """Stream a reply, with new attempts while no text of it has come.

        Raises:
            ModelError: the reply failed; see the codes in :mod:`wsserver.errors`.
        """
        takes_temperature = request.model not in self._without_temperature
        body = arguments(request, self._settings, takes_temperature=takes_temperature)
        budget = self._settings.retry_budget
        spent: Usage | None = None
        for attempt in range(self._settings.retries + 1):
            reply = Reply(take, request.max_tokens, spent)
            try:
                await self._attempt(body, reply, attempt)
            except TransientError as failure:
                error = failure.error
                pause = error.retry_after
                if pause is None:
                    # Full jitter: requests that failed together do not come back together.
                    pause = random.uniform(0, min(MAX_PAUSE, 0.5 * 2**attempt))  # noqa: S311
                longest = min(budget, self._settings.silence_timeout)
                if reply.begun or attempt == self._settings.retries or pause > longest:
                    raise error from failure.__cause__
                log.debug("attempt failed", model=request.model, code=error.code, pause=pause)
                budget -= pause
                spent = reply.spent
                take("")  # each attempt may be silent for as long as the first
                await asyncio.sleep(pause)
                take("")
            else:
                return

    async def _attempt(self, body: dict[str, Any], reply: Reply, resent: int) -> None:
        """Make one attempt; another one at once if the API refused what can be left out or renewed.

        Raises:
            ModelError: the attempt failed.
            TransientError: the attempt failed, and the next one may succeed.
        """
        refused: Template | None = None
        while True:
            try:
                template = await self._current_template(refused)
                origin = template.origin
                with RequestSpan(origin.host, origin.port, template.url, resent) as span:
                    await self._exchange(template, to_json(body), reply, span)
            except HttpError as error:
                raise of_http(error) from error
            except ApiError as error:
                resent += 1
                if error.status == _UNAUTHORIZED and refused is None and self._renews:
                    refused = template
                elif not self._leave_out_temperature(error, body):
                    raise error.failure() from error
            else:
                return

    async def _exchange(
        self, template: Template, body: bytes, reply: Reply, span: RequestSpan
    ) -> None:
        response = await self._pool.post(template, body)
        try:
            span.on_status(response.status)
            if response.status != _OK:
                raise await _error(response)
            if not (response.header(b"content-type") or b"").startswith(b"text/event-stream"):
                raise ModelError(Code.MALFORMED)
            response.headers.clear()
            try:
                await response.read_body(reply.feed)
                end = reply.end()
            finally:
                reply.close()
            response.release()  # the end of the body is not worth waiting for
        finally:
            await response.aclose()
        reply.take(end)

    def _leave_out_temperature(self, error: ApiError, body: dict[str, Any]) -> bool:
        """Leave out a temperature that the model does not accept, and return whether that was it.

        Raises:
            ModelError: the model accepts a temperature, but not so high a one.
        """
        temperature = body.get("temperature")
        if temperature is None or "temperature" not in error.message:
            return False
        if temperature > MAX_TEMPERATURE:
            failure = ModelError(Code.BAD_REQUEST, "temperature: the model's API refused it.")
            failure.kind = error.kind
            raise failure from error
        self._without_temperature.add(body["model"])
        del body["temperature"]
        return True

    # What the SDK knows.

    @property
    def _renews(self) -> bool:
        return self._sdk is not None and self._sdk.renews

    def _tls(self) -> ssl.SSLContext:
        assert self._sdk is not None
        return self._sdk.tls()

    async def _current_template(self, refused: Template | None = None) -> Template:
        """Return where requests go and their headers.

        Args:
            refused: the template whose credentials the API refused.

        Raises:
            ConfigError: the SDK cannot be used.
            InvalidRequest: a header of the environment is malformed.
            ModelError: there are no credentials.
            TransientError: there are no credentials now.
        """
        loop = asyncio.get_running_loop()
        template = self._template
        fresh = loop.time() < self._recorded + TEMPLATE_TIME
        if template is not None and fresh and template is not refused:
            return template
        recording = self._recording
        if recording is None:
            renew = refused is not None and template is refused
            recording = self._recording = loop.create_task(self._record(renew=renew))
            recording.add_done_callback(_retrieve)
        await asyncio.wait({recording})
        return recording.result()

    async def _record(self, *, renew: bool) -> Template:
        try:
            sdk = await self._load_sdk()
            self._template = await sdk.record(renew=renew)
            self._recorded = asyncio.get_running_loop().time()
            return self._template
        finally:
            self._recording = None

    async def _load_sdk(self) -> "Sdk":
        if self._sdk is None:
            if self._loading is None:
                loading = asyncio.to_thread(_load, self.name)
                self._loading = asyncio.get_running_loop().create_task(loading)
            await asyncio.wait({self._loading})
            self._sdk = self._loading.result()
        return self._sdk


def _load(name: str) -> "Sdk":
    from wsserver.models.anthropic.sdk import Sdk  # noqa: PLC0415

    return Sdk(name)


def _retrieve(task: asyncio.Task[Template]) -> None:
    if not task.cancelled():
        task.exception()  # whoever waited may have been cancelled


def _has_key() -> bool:
    """Return whether the environment has a key or a token, which the SDK then uses.

    Raises:
        ConfigError: a setting of the environment is malformed.
    """
    address = os.environ.get("ANTHROPIC_BASE_URL")
    if address is not None:
        try:
            url = urlsplit(address)
            sound = url.scheme in PORTS and url.hostname and url.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise ConfigError("model: ANTHROPIC_BASE_URL is no http:// or https:// address")
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        if value := os.environ.get(name):
            if not (value.isascii() and value.isprintable()):
                raise ConfigError(f"model: {name} has characters that no HTTP header may have")
            return True
    return False


async def _error(response: Response) -> ApiError:
    """Return the error of a response, whose body may be anything."""
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
