"""Tokens that the operator issues to principals. The server knows only their digests.

A file has one line per token: ``NAME sha256:DIGEST``, and optionally the last day of the token as
``YYYY-MM-DD``. ``#`` begins a comment. A token has 256 random bits, which nobody can guess from a
SHA-256 digest. So a slow hash would add no protection.
"""

import datetime as dt
import hashlib
import hmac
import os
import re
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from wsserver.auth.base import ANONYMOUS, Handshake, Principal
from wsserver.errors import ConfigError
from wsserver.logs import log

PREFIX = "wss_"  # lets tools that search for leaked secrets recognize a token
MAX_TOKEN = 256  # characters; a longer token is not hashed
_LINE = re.compile(
    r"(?P<name>[^\s#]\S{0,255})\s+sha256:(?P<digest>[0-9a-f]{64})(?:\s+(?P<last>\d{4}-\d\d-\d\d))?"
)


class _Known(NamedTuple):
    digest: bytes
    principal: Principal


class Tokens:
    """Finds principals by their tokens.

    Args:
        lines: lines of a token file, separated by commas or line ends.
        path: a token file, which :meth:`reload` reads again.

    Raises:
        ConfigError: a line is invalid, or the file cannot be read.
    """

    def __init__(self, lines: str = "", path: Path | None = None) -> None:
        self._given = _parse(lines.replace(",", "\n"), "tokens")
        self._path = path
        self._known = self._given + self._read()

    async def __call__(self, token: str | None, _: Handshake, /) -> Principal | None:
        """Return the principal of a token, or None if no principal has the token."""
        if token is None or len(token) > MAX_TOKEN:
            return None
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found = None
        for known in self._known:  # no early exit: the time must not depend on the token
            if hmac.compare_digest(known.digest, digest):
                found = known.principal
        if found is not None and found.expires is not None and found.expires <= time.time():
            return None
        return found

    async def reload(self) -> bool:
        """Read the file again. An invalid file changes nothing, and is logged."""
        try:
            self._known = self._given + self._read()
        except ConfigError as error:
            log.error("tokens not reloaded", reason=str(error))
            return False
        return True

    def _read(self) -> list[_Known]:
        if self._path is None:
            return []
        try:
            text = self._path.expanduser().read_text()
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "the file is not text"
            raise ConfigError(f"token_file: cannot read {self._path}: {reason}") from error
        return _parse(text, f"token_file: {self._path}")


def _parse(text: str, where: str) -> list[_Known]:
    known = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            # The message does not quote the line: it may contain a token instead of a digest.
            raise ConfigError(
                f"{where}: entry {number} is not NAME sha256:DIGEST; "
                "`wsserver token new NAME` makes one"
            )
        expires = None
        if match["last"] is not None:
            try:
                last = dt.date.fromisoformat(match["last"])
            except ValueError:
                raise ConfigError(f"{where}: entry {number}: there is no such day") from None
            midnight = dt.datetime.combine(last, dt.time(), dt.UTC)
            expires = midnight.timestamp() + 86_400
        known.append(_Known(bytes.fromhex(match["digest"]), Principal(match["name"], expires)))
    return known


def new(name: str, days: int | None = None) -> tuple[str, str]:
    """Make a token; return the token and its line for a token file.

    Args:
        name: name of the principal, without white space.
        days: days from tomorrow on that the token is valid; None for ever.

    Raises:
        ConfigError: the name is not allowed, or there are too many days.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    if days is not None:
        try:
            last = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=days)
        except OverflowError:
            raise ConfigError(f"{days} days are too many") from None
        line += f" {last}"
    if not name.isprintable() or not {",", "#"}.isdisjoint(name) or not _LINE.fullmatch(line):
        raise ConfigError("a token's name is 1 to 256 characters without spaces, commas and #")
    if name == ANONYMOUS.name:
        raise ConfigError(f"a token's name cannot be {name!r}, the name of clients without a token")
    return token, line


def add(path: Path, line: str) -> None:
    """Append a line to a token file. A new file is readable by its owner only.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        descriptor = os.open(path.expanduser(), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            before = file.read()
            separator = b"" if not before or before.endswith(b"\n") else b"\n"
            file.write(separator + line.encode() + b"\n")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "no such folder"
        raise ConfigError(f"cannot write {path}: {reason}") from error
