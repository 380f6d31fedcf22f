"""Lines that the terminal shows about replies, errors and the connection.

A model's text may contain control characters that a terminal would execute. :func:`escape` makes
them visible.
"""

import errno
import socket
import ssl
import unicodedata
from http import HTTPStatus
from time import time
from urllib.parse import urlsplit

from wsserver.client import ConnectionFailed, ServerError, Usage
from wsserver.client.dial import without_credentials
from wsserver.errors import TELL, Code
from wsserver.protocol import Close
from wsserver.settings import CHAT_TOKEN

THOUGHT_SHOWN = 300  # characters of the model's thinking
PROMPT_SHOWN, PROMPT_LINES = 2000, 20  # characters and lines of a prompt

# Why a reply is incomplete: the cause of a stop, or ``cut``. wording.js has the same.
STOPPED_BY = {
    "client": "stopped",
    "disconnect": "stopped, because the connection was lost",
    "replaced": "stopped by a later message",
    "timeout": "stopped, because it took too long",
    "shutdown": "stopped, because the server shut down",
    "cut": "shortened, because it is too long to load again",
}

# Characters that change the writing direction: with them a text can look like another one.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape(text: str) -> str:
    """Return text with its control characters escaped, except line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if character in "\n\t":
        return character
    control = unicodedata.category(character) in {"Cc", "Cs"} or character in _DIRECTIONS
    return ascii(character)[1:-1] if control else character


def describe_thought(thinking: str, seconds: float = 0.0) -> str:
    """Return the line about the model's thinking. ``seconds`` is its duration if it is known."""
    shown = escape(" ".join(thinking.split()))
    if len(shown) > THOUGHT_SHOWN:
        shown = shown[:THOUGHT_SHOWN] + "…"
    duration = f" for {seconds:.0f} s" if seconds >= 1 else ""
    return f"[thought{duration}: {shown}]"


def describe_partial(cause: str) -> str:
    """Return why a reply is incomplete. ``cause``: of a stop, or the code of an error."""
    if cause in STOPPED_BY:
        return STOPPED_BY[cause]
    meaning = next((code.meaning for code in Code if code == cause), escape(cause))
    return f"incomplete: {meaning}"


def describe_cost(model: str | None, usage: Usage | None) -> str:
    """Return the line about the model and the tokens of a reply."""
    facts = [] if model is None else [escape(model)]
    if usage is not None:
        read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        about = "about " if usage.estimated else ""
        given = usage.input_tokens + read + written
        facts.append(f"{given:,} tokens in, {about}{usage.output_tokens:,} out")
    return f"[{' · '.join(facts)}]"


def describe_error(error: Exception, reason: str = "") -> str:
    """Return one line about an error of the server or of the connection.

    Args:
        error: the exception.
        reason: why, if the user is the operator of the server.
    """
    text = escape(str(error))
    if not isinstance(error, ServerError):
        return text
    if error.code == Code.UNAUTHENTICATED:
        return f"the server needs a valid token: set {CHAT_TOKEN} to one ({error.code})"
    if error.code == Code.INTERRUPTED:
        text += "; the text that arrived is kept"
    if error.retry_after is not None:
        text += f"; try again in {max(1, round(error.retry_after))} s"
    elif error.retryable and "ry again" not in text:
        text += "; try again"
    if reason:
        return f"{text.replace(f'{TELL} ', '')}: {escape(reason)}"
    if error.ref and TELL in error.message:
        text += f" Reference: {escape(error.ref)}"
    return text


def describe_failure(failure: ConnectionFailed, url: str, *, has_token: bool) -> str:
    """Return one sentence that says why there is no connection and what to do.

    Args:
        failure: the exception.
        url: the server's address.
        has_token: whether the client sent a token.
    """
    address, told = escape(without_credentials(url)), escape(str(failure)).rstrip(".")
    cause = failure.__cause__
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    if cause is not None:
        return _describe_cause(cause, address, urlsplit(url).hostname or "")
    if failure.status == HTTPStatus.UNAUTHORIZED or failure.close_code == Close.POLICY_VIOLATION:
        what = "refuses the token" if has_token else "needs a token"
        return f"{address} {what} ({told}): set {CHAT_TOKEN} to a valid one"
    if failure.status == HTTPStatus.FORBIDDEN:
        return f"{address} refuses this client ({told}): ask the operator of the server"
    if failure.status is not None or "not a WebSocket server" in told:
        return f"{address} does not answer as wsserver does ({told}): correct host, port and path"
    return f"{told}{_advise(told)}"


def _advise(told: str) -> str:
    """Return what to do about a connection that failed without an error of the system."""
    if told.startswith("cannot connect to ws://") and "during the handshake" in told:
        return ": try wss:// instead, or correct the port"
    return ": check the address and the network" if told.startswith("cannot connect") else ""


def _describe_cause(cause: OSError, address: str, host: str) -> str:
    reason = escape(cause.strerror or str(cause))
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {address} is not trusted ({escape(cause.verify_message)}): "
            "correct the host name, or set SSL_CERT_FILE to the certificate of its issuer"
        )
    if isinstance(cause, ssl.SSLError):
        return f"{address} does not speak TLS ({escape(cause.reason or reason)}): try ws:// instead"
    if isinstance(cause, socket.gaierror):
        return f"there is no host {escape(host)!r} ({reason}): correct the address"
    # asyncio joins the errors of several addresses of one host in the text of another error.
    if cause.errno == errno.ECONNREFUSED or f"Errno {errno.ECONNREFUSED}" in str(cause):
        return (
            f"no server listens at {address}: start one with `wsserver serve`, or correct the host "
            "and the port"
        )
    return f"cannot connect to {address} ({reason}): check the address and the network"


def quoted(text: str) -> str:
    """Return a person's prompt as the terminal shows it, with ``>`` before its first line."""
    lines = text.split("\n")
    shown = "\n".join(lines[:PROMPT_LINES])[:PROMPT_SHOWN]
    left_out = len(text) - len(shown)
    rest = f"\n[{left_out:,} more characters]" if left_out else ""
    return "> " + (escape(shown) + rest).replace("\n", "\n  ")


def age(when: float) -> str:
    """Return how long ago a time was. Seconds since 1970."""
    seconds = max(0.0, time() - when)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "now"
