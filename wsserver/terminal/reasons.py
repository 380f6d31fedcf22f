"""Why replies of a private server failed. Its user is its operator, and sees no log."""

import contextlib
import logging
from collections.abc import Iterator

from wsserver.client import ServerError
from wsserver.logs import logger


class Reasons(logging.Handler):
    """Keeps what the log says about errors, by their ``ref``."""

    def __init__(self) -> None:
        super().__init__()
        self._reasons: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the reason that an event has for an error."""
        event = getattr(record, "event", {})
        if "ref" in event:
            known = [event[key] for key in ("advice", "detail") if key in event]
            failure = record.exc_info[1] if record.exc_info else None
            if failure is not None and not known:
                place = event["where"].partition(" from ")[0].rpartition(", ")[2]
                known.append(f"{type(failure).__name__}: {failure} ({place})")
            self._reasons[event["ref"]] = "; ".join(known)

    def of(self, error: ServerError) -> str:
        """Return the reason for an error; an empty text if none is known."""
        return self._reasons.pop(error.ref, "")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the reasons of the servers of this process."""
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)  # for the texts of exceptions and of the model's API
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(self)
