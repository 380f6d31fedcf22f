"""The findings of the checks."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The result of one check."""

    OK = "ok"
    WARNING = "warning"  # the deployment works, but not as it should
    FAILED = "failed"
    SKIPPED = "skipped"  # the check did not run, or its evidence was not enough


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: name of the check.
        status: the result.
        seen: the evidence, in one line.
        mend: what to change, one line for each alternative.
    """

    check: str
    status: Status
    seen: str
    mend: tuple[str, ...] = ()


Report = Callable[[Finding], None]
"""Takes the next finding of a check."""


def ok(check: str, seen: str) -> Finding:
    """Return the finding of a check that holds."""
    return Finding(check, Status.OK, seen)


def warning(check: str, seen: str, *mend: str) -> Finding:
    """Return the finding of a check that holds in part."""
    return Finding(check, Status.WARNING, seen, mend)


def failed(check: str, seen: str, *mend: str) -> Finding:
    """Return the finding of a check that does not hold."""
    return Finding(check, Status.FAILED, seen, mend)


def skipped(check: str, why: str) -> Finding:
    """Return the finding of a check that did not run."""
    return Finding(check, Status.SKIPPED, why)
