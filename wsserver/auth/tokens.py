"""Tokens that the operator hands out, each to somebody by name. Only their digests are kept.

One line each, ``NAME sha256:DIGEST`` and if it ends one day ``YYYY-MM-DD``; ``#`` begins a
comment. A token is 256 random bits, so that its plain SHA-256 tells nothing and a slow hash would
protect nothing.
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

__all__ = ["Tokens", "add", "new"]

PREFIX = "wss_"  # so that tools which look for leaked secrets can know one
LONGEST = 256  # characters of a token, before it is hashed
_LINE = re.compile(
    r"(?P<name>[^\s#]\S{0,255})\s+sha256:(?P<digest>[0-9a-f]{64})(?:\s+(?P<last>\d{4}-\d\d-\d\d))?"
)


class _Known(NamedTuple):
    digest: bytes
    principal: Principal


class Tokens:
    """Knows principals by their tokens.

    Args:
        lines: tokens as they stand in a file, separated by commas or line ends.
        path: a file of them, read again by :meth:`reload`.

    Raises:
        ConfigError: a line is none, or the file cannot be read.
    """

    def __init__(self, lines: str = "", path: Path | None = None) -> None:
        self._given = _parse(lines.replace(",", "\n"), "tokens")
        self._path = path
        self._known = self._given + self._read()

    async def __call__(self, token: str | None, _: Handshake, /) -> Principal | None:
        """Return whose token it is."""
        if token is None or len(token) > LONGEST:
            return None
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found = None
        for known in self._known:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known.digest, digest):
                found = known.principal
        if found is not None and found.expires is not None and found.expires <= time.time():
            return None
        return found

    async def reload(self) -> bool:
        """Read the file again. One that has become unusable changes nothing."""
        try:
            self._known = self._given + self._read()
        except ConfigError as error:
            log.error("tokens not read again", reason=str(error))
            return False
        return True

    def _read(self) -> list[_Known]:
        if self._path is None:
            return []
        try:
            text = self._path.expanduser().read_text()
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
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
            # Without the line itself: somebody may have put a token where its digest belongs.
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
            expires = _end_of(last)
        known.append(_Known(bytes.fromhex(match["digest"]), Principal(match["name"], expires)))
    return known


def _end_of(day: dt.date) -> float:
    midnight = dt.datetime.combine(day, dt.time(), dt.UTC)
    return midnight.timestamp() + 86_400


def new(name: str, days: int | None = None) -> tuple[str, str]:
    """Make a token: return it, and the line that lets it in.

    Args:
        name: the principal's; no white space.
        days: for how many it is good, today not counted; None for ever.

    Raises:
        ConfigError: the name cannot be one.
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
    if name == ANONYMOUS.name:  # which no token lets in
        raise ConfigError(f"a token's name cannot be {name!r}: so are called all who have none")
    return token, line


def add(path: Path, line: str) -> None:
    """Append a line to a file of tokens, which is made if need be, for its owner's eyes alone.

    Raises:
        ConfigError: it cannot be written.
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
