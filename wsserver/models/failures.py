"""Maps failures of a model's API to error codes, and says whether a new attempt may succeed."""

import contextlib
import email.utils
import re
import time
from collections.abc import Mapping

from wsserver.errors import Code, ModelError, WsserverError
from wsserver.models.dial import CannotConnect, ConnectTimeout, ProxyRefused, Untrusted
from wsserver.models.http import Redirected
from wsserver.models.response import ClosedEarly, HttpError, NoResponse

BY_STATUS = {  # the code of each status of an API
    400: Code.BAD_REQUEST,
    401: Code.CREDENTIALS,
    402: Code.SPEND_LIMIT,
    403: Code.CREDENTIALS,
    404: Code.MODEL_NOT_FOUND,
    405: Code.MODEL_NOT_FOUND,
    407: Code.UNREACHABLE,  # of a proxy
    408: Code.TIMEOUT,
    413: Code.REQUEST_TOO_LARGE,
    429: Code.RATE_LIMITED,
    503: Code.OVERLOADED,
    504: Code.TIMEOUT,
    529: Code.OVERLOADED,
}
_BY_FAILURE: tuple[tuple[type[HttpError], Code], ...] = (  # a class before its bases
    (ConnectTimeout, Code.TIMEOUT),
    (Untrusted, Code.UNTRUSTED),
    (CannotConnect, Code.UNREACHABLE),
    (NoResponse, Code.UNREACHABLE),
    (ClosedEarly, Code.INCOMPLETE),
    (Redirected, Code.REDIRECTED),
)
_PASSING = (Code.TIMEOUT, Code.UNREACHABLE, Code.INCOMPLETE)
# Messages of servers about a path that they do not have. Some send none.
_NO_PATH = re.compile(
    r"^not found|invalid url|(unexpected|unknown) (endpoint|request url)|(file|page) not found",
    re.IGNORECASE,
)
_NO_PATH_STATUS = (404, 405)
_MAX_DETAIL = 500  # characters
_BAD_REQUEST = 400
_SERVER_ERROR = 500


class TransientError(WsserverError):
    """An attempt failed, and the next attempt may succeed."""

    def __init__(self, error: ModelError) -> None:
        super().__init__(str(error.code))
        self.error = error


class ApiError(WsserverError):
    """The API answered with an error.

    A subclass parses the body of its API.

    Args:
        status: the status of the response.
        headers: the headers of the response, with names in lower case.
        kind: the API's name of the error.
        message: the API's message.
        request_id: the API's id of the request.
    """

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        *,
        kind: object = None,
        message: object = None,
        request_id: object = None,
    ) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.kind = word(kind)
        self.request_id = request_id_of(request_id)
        self.detail = message[:_MAX_DETAIL] if isinstance(message, str) else ""
        # The message of a 400. It may quote the prompt and is not for the log.
        self.message = message if isinstance(message, str) and status == _BAD_REQUEST else ""
        self.advice: str | None = None  # for the operator
        self._headers = headers

    def code(self) -> Code:
        """Return the code of the error."""
        code = BY_STATUS.get(self.status)
        if code is None:
            code = Code.UPSTREAM_ERROR if self.status >= _SERVER_ERROR else Code.BAD_REQUEST
        return code

    def failure(self) -> ModelError | TransientError:
        """Return the exception to raise."""
        code = self.code()
        error = ModelError(code, retry_after=self._retry_after() if code.retryable else None)
        self.identify(error)
        if code.retryable and self._headers.get("x-should-retry") != "false":
            return TransientError(error)
        return error

    def identify(self, error: ModelError) -> None:
        """Copy what is known about the error, for the log."""
        error.kind, error.status, error.request_id = self.kind, self.status, self.request_id
        error.advice, error.detail = self.advice, self.detail or None

    @property
    def has_no_path(self) -> bool:
        """Whether the server does not have the path of the request: its URL is wrong."""
        return self.status in _NO_PATH_STATUS and (not self.detail or is_no_path(self.detail))

    def _retry_after(self) -> float | None:
        """Return how long to wait, in seconds (RFC 9110 section 10.2.3; `-ms` is of some APIs)."""
        for name, scale in (("retry-after-ms", 1000), ("retry-after", 1)):
            with contextlib.suppress(ValueError, OverflowError):
                seconds = float(self._headers.get(name, "")) / scale
                if 0 <= seconds < float("inf"):
                    return seconds
        with contextlib.suppress(KeyError, ValueError):
            when = email.utils.parsedate_to_datetime(self._headers["retry-after"])
            return max(0.0, when.timestamp() - time.time())
        return None


def is_no_path(message: str) -> bool:
    """Whether a message says that the server does not have a path."""
    return _NO_PATH.search(message) is not None


def of_http(error: HttpError, url: str) -> ModelError | TransientError:
    """Return the exception to raise for an exchange with a URL that failed."""
    code = next((code for kind, code in _BY_FAILURE if isinstance(error, kind)), Code.MALFORMED)
    model_error = ModelError(code)
    model_error.detail = f"{url}: {error}"
    if isinstance(error, ProxyRefused):
        model_error.kind = "proxy_refused"
    return TransientError(model_error) if code in _PASSING else model_error


def mid_stream(
    code: Code,
    kind: object,
    message: object,
    request_id: object = None,
    *,
    advice: str | None = None,
) -> ModelError | TransientError:
    """Return the exception to raise for an error event, whose response has the status 200."""
    error = ModelError(code)
    error.kind, error.request_id = word(kind), request_id_of(request_id)
    error.detail = message[:_MAX_DETAIL] if isinstance(message, str) else None
    error.advice = advice
    return TransientError(error) if code.retryable else error


def get(value: object, name: str) -> object:
    """Return the value of a key; None if ``value`` is no object or has no such key."""
    return value.get(name) if isinstance(value, dict) else None


def word(kind: object) -> str | None:
    """Return the name of an error, if it is a word; the log has no other text of an API."""
    return kind if isinstance(kind, str) and re.fullmatch(r"[A-Za-z_]{1,64}", kind) else None


def request_id_of(name: object) -> str | None:
    """Return the id of a request, if it has the form of Anthropic's and OpenAI's ids."""
    return name if isinstance(name, str) and re.fullmatch(r"req_[0-9A-Za-z]{1,64}", name) else None
