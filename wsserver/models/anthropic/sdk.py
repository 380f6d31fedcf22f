"""Gets the URL and the headers of requests from Anthropic's SDK. The SDK sends no request.

The SDK reads everything from the environment: the base URL, the key, profiles, the renewal of
credentials, custom headers. It makes one request without a prompt, which is recorded and not sent.
Prompts are then sent with the recorded headers: a request of the SDK for each prompt would cost
more CPU than all the rest of a short reply. This module uses only public names of the SDK and of
httpx2.

The import of this module takes most of a second: :mod:`wsserver.models.anthropic.templates` imports
it in a thread.
"""

import ssl
from collections.abc import Mapping
from typing import Any

import anthropic
import httpx2

from wsserver.errors import Code, ConfigError, ModelError
from wsserver.models.dial import Origin
from wsserver.models.failures import TransientError
from wsserver.models.http import InvalidRequest, Template
from wsserver.models.proxy import PORTS, proxy_for

_UNAUTHORIZED = 401
_SERVER_ERROR = 500


class _Recorder(httpx2.AsyncBaseTransport):
    """Records the request of the SDK, and answers it with an empty stream."""

    request: httpx2.Request

    def __init__(self) -> None:
        # Answer the next request with 401: the SDK then renews its credentials, and sends the
        # request again at once.
        self.refuse = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.request = request
        if self.refuse:
            self.refuse = False
            return httpx2.Response(_UNAUTHORIZED, headers={"retry-after-ms": "1"})
        return httpx2.Response(200, headers={"content-type": "text/event-stream"})


class Sdk:
    """The client of the SDK, configured by the environment.

    Raises:
        ConfigError: there are no credentials, or a profile or another setting of the environment
            is broken.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._recorder = _Recorder()
        http_client = httpx2.AsyncClient(
            transport=self._recorder,
            headers={"accept-encoding": "identity"},  # decompression costs time for each token
        )
        try:
            self._client = anthropic.AsyncAnthropic(
                max_retries=1,  # of the recorded request, after its 401
                timeout=httpx2.Timeout(None),
                http_client=http_client,
                open_telemetry=False,  # the SDK sends no real request
            )
        except (anthropic.AnthropicError, httpx2.InvalidURL) as error:
            raise ConfigError(f"model: {model}: {error}") from error
        if not (self._client.auth_headers or self._client.credentials):
            raise ConfigError(
                f"model: {model} needs Anthropic credentials; set ANTHROPIC_API_KEY, "
                "or try --model demo"
            )
        self._create = self._client.messages.with_raw_response.create  # imports its types
        self.origin = _origin(self._client.base_url, {})
        self._tls: ssl.SSLContext | None = None
        try:
            if self.origin.scheme == "https":
                self.tls()
        except OSError as error:
            raise ConfigError("model: SSL_CERT_FILE or SSL_CERT_DIR cannot be read") from error

    def tls(self) -> ssl.SSLContext:
        """Return a TLS context with the trust settings of the environment and of the system."""
        if self._tls is None:
            self._tls = httpx2.create_ssl_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    @property
    def renews(self) -> bool:
        """Whether the SDK has credentials that it can renew."""
        return self._client.custom_auth is not None

    async def record(self, *, renew: bool) -> Template:
        """Return a template with the current URL and headers.

        Args:
            renew: whether to renew the credentials first, because the API refused them.

        Raises:
            ConfigError: a header of the environment is malformed.
            ModelError: the SDK has no valid credentials.
            TransientError: the SDK cannot get credentials now.
        """
        self._recorder.refuse = renew
        try:
            await self._create(model=self._model, max_tokens=1, messages=[], stream=True)
        except anthropic.WorkloadIdentityError as error:
            if error.status_code is None:
                raise TransientError(ModelError(Code.UNREACHABLE)) from error
            if error.status_code >= _SERVER_ERROR:
                raise TransientError(ModelError(Code.UPSTREAM_ERROR)) from error
            raise ModelError(Code.CREDENTIALS) from error
        except anthropic.APIConnectionError as error:
            raise TransientError(ModelError(Code.UNREACHABLE)) from error
        except anthropic.AnthropicError as error:
            raise ModelError(Code.CREDENTIALS) from error
        request = self._recorder.request
        origin = _origin(request.url, request.extensions)
        try:
            return Template.make(origin, request.url.raw_path, request.headers.raw)
        except InvalidRequest as error:
            raise ConfigError(f"model: {error}") from error

    async def aclose(self) -> None:
        """Close the client of the SDK."""
        await self._client.close()


def _origin(url: httpx2.URL, extensions: Mapping[str, Any]) -> Origin:
    """Return the origin of a URL.

    Raises:
        ConfigError: the scheme of the URL or of the proxy is not supported.
    """
    if url.scheme not in PORTS:
        raise ConfigError(f"model: {url.scheme}:// is not supported")
    host = url.raw_host.decode("ascii")
    port = url.port or PORTS[url.scheme]
    server_name = extensions.get("sni_hostname") or host
    return Origin(url.scheme, host, port, server_name, proxy_for(url.scheme, host, port))
