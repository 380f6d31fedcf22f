"""The URL and the headers of requests, from the variables that OpenAI's SDK also reads."""

import os
import ssl
from urllib.parse import urlsplit

from wsserver.errors import ConfigError
from wsserver.models.dial import Origin
from wsserver.models.http import InvalidRequest, Template
from wsserver.models.proxy import PORTS, proxy_for

OPENAI = "https://api.openai.com/v1"

_HEADERS = {"OPENAI_ORG_ID": b"openai-organization", "OPENAI_PROJECT_ID": b"openai-project"}


class Environment:
    """``OPENAI_BASE_URL``, ``OPENAI_API_KEY``, ``OPENAI_ORG_ID`` and ``OPENAI_PROJECT_ID``.

    OpenAI's own API needs a key. Another server may need none.

    Args:
        model: the model, for errors.

    Raises:
        ConfigError: a variable is missing or malformed.
    """

    renewable = False

    def __init__(self, model: str) -> None:
        origin, path = _parse(os.environ.get("OPENAI_BASE_URL") or OPENAI)
        key = os.environ.get("OPENAI_API_KEY", "")
        self.is_openai = f".{origin.host}".endswith(".api.openai.com")  # also eu.api.openai.com
        if self.is_openai and not key:
            raise ConfigError(
                f"model: {model} needs OPENAI_API_KEY; or set OPENAI_BASE_URL to a server of your "
                "own, such as http://localhost:11434/v1, or try --model demo"
            )
        headers = [
            (b"content-type", b"application/json"),
            (b"accept", b"text/event-stream"),
            (b"accept-encoding", b"identity"),  # decompression costs time for each token
        ]
        if key:
            headers.append((b"authorization", b"Bearer " + _encode("OPENAI_API_KEY", key)))
        headers += [
            (header, _encode(name, value))
            for name, header in _HEADERS.items()
            if (value := os.environ.get(name))
        ]
        headers.insert(0, (b"host", _host(origin)))
        try:
            self._template = Template.make(origin, path + b"/chat/completions", headers)
            self._tls = ssl.create_default_context() if origin.scheme == "https" else None
        except InvalidRequest as error:
            raise ConfigError(f"model: {error}") from error
        except OSError as error:
            raise ConfigError("model: SSL_CERT_FILE or SSL_CERT_DIR cannot be read") from error

    def tls(self) -> ssl.SSLContext:
        """Return a TLS context with the trust settings of the environment and of the system."""
        if self._tls is None:  # a proxy has TLS, but not the server
            self._tls = ssl.create_default_context()
        return self._tls

    async def current(self, refused: Template | None = None) -> Template:  # noqa: ARG002
        """Return the template, which never changes."""
        return self._template

    async def aclose(self) -> None:
        """Do nothing: no resource is held."""


def _parse(base: str) -> tuple[Origin, bytes]:
    """Return the origin and the path of a base URL.

    Raises:
        ConfigError: it is not a URL.
    """
    try:
        url = urlsplit(base)
        port = url.port
        host = (url.hostname or "").encode("idna").decode("ascii")
        path = url.path.rstrip("/").encode("ascii")
    except ValueError:
        host = ""
    if not host or url.scheme not in PORTS or url.query or url.username:
        raise ConfigError("model: OPENAI_BASE_URL is not an http:// or https:// URL")
    port = port or PORTS[url.scheme]
    return Origin(url.scheme, host, port, host, proxy_for(url.scheme, host, port)), path


def _host(origin: Origin) -> bytes:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    port = "" if origin.port == PORTS[origin.scheme] else f":{origin.port}"
    return f"{host}{port}".encode("ascii")


def _encode(name: str, value: str) -> bytes:
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(f"model: {name} has characters that are not allowed in an HTTP header")
    return value.encode("ascii")
