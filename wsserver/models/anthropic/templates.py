"""Caches the URL and the headers of requests, which Anthropic's SDK provides."""

import asyncio
import os
import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from wsserver.errors import ConfigError
from wsserver.models.http import Template
from wsserver.models.proxy import PORTS

if TYPE_CHECKING:
    from wsserver.models.anthropic.sdk import Sdk

TEMPLATE_TIME = 20.0  # seconds; the SDK renews a token that expires within 30


class Templates:
    """Imports the SDK, and caches the last template from it.

    The import takes most of a second. If the environment has a key or a token, a thread imports the
    SDK when it is first needed. Otherwise the SDK has to find credentials, and is imported at once.

    Raises:
        ConfigError: there are no credentials, or a setting of the environment is malformed.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._template: Template | None = None
        self._recorded = 0.0  # when, by the clock of the event loop
        self._recording: asyncio.Task[Template] | None = None
        self._loading: asyncio.Task[Sdk] | None = None
        self._sdk: Sdk | None = None if _has_key() else _import_sdk(model)

    @property
    def renewable(self) -> bool:
        """Whether the SDK can renew its credentials."""
        return self._sdk is not None and self._sdk.renews

    def tls(self) -> ssl.SSLContext:
        """Return the TLS context. A template must exist."""
        assert self._sdk is not None
        return self._sdk.tls()

    async def import_sdk(self) -> "Sdk":
        """Import the SDK, unless it is imported.

        Raises:
            ConfigError: the SDK cannot be used as the environment configures it.
        """
        if self._sdk is None:
            if self._loading is None:
                loading = asyncio.to_thread(_import_sdk, self._model)
                self._loading = asyncio.get_running_loop().create_task(loading)
                self._loading.add_done_callback(_retrieve)
            await asyncio.wait({self._loading})
            self._sdk = self._loading.result()
        return self._sdk

    async def current(self, refused: Template | None = None) -> Template:
        """Return the template for a request.

        Args:
            refused: a template with credentials that the API refused; the SDK renews them.

        Raises:
            ConfigError: the SDK cannot be used as the environment configures it.
            ModelError: the SDK has no valid credentials.
            TransientError: the SDK cannot get credentials now.
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
            sdk = await self.import_sdk()
            self._template = await sdk.record(renew=renew)
            self._recorded = asyncio.get_running_loop().time()
            return self._template
        finally:
            self._recording = None

    async def aclose(self) -> None:
        """Close the SDK."""
        for task in (self._recording, self._loading):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self._sdk is not None:
            await self._sdk.aclose()


def _import_sdk(model: str) -> "Sdk":
    from wsserver.models.anthropic.sdk import Sdk  # noqa: PLC0415

    return Sdk(model)


def _retrieve(task: asyncio.Task[Template] | asyncio.Task["Sdk"]) -> None:
    """Mark the exception of a task as retrieved: all its waiters may have been cancelled."""
    if not task.cancelled():
        task.exception()


def _has_key() -> bool:
    """Return whether the environment has a key or a token for the SDK.

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
            raise ConfigError("model: ANTHROPIC_BASE_URL is not an http:// or https:// URL")
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        if value := os.environ.get(name):
            if not (value.isascii() and value.isprintable()):
                raise ConfigError(
                    f"model: {name} has characters that are not allowed in an HTTP header"
                )
            return True
    return False
