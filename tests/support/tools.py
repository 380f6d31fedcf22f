"""The programs that tests drive for real, such as a browser. `make system` installs them."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

__all__ = ["ROOT", "require_chromium", "require_nginx", "require_systemd", "require_wscat"]


def require_chromium() -> str:
    """Return its path. Where there is none, skip the test, or on CI fail it."""
    return _require("chromium", shutil.which("chromium") or shutil.which("chromium-browser"))


def require_wscat() -> str:
    """Return its path. Where there is none, skip the test, or on CI fail it."""
    own = shutil.which("wscat", path=ROOT / ".tools/node_modules/.bin")
    return _require("wscat", own or shutil.which("wscat"))


def require_nginx() -> str:
    """Return its path. Where there is none, skip the test, or on CI fail it."""
    return _require("nginx", _which("nginx"))


def require_systemd(tool: str) -> str:
    """Return the path of one of its tools. Where there is none, skip the test, or on CI fail it."""
    return _require(tool, _which(tool))


def _which(name: str) -> str | None:
    # Not every user has the folders of what administrators use.
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _require(name: str, path: str | None) -> str:
    if path is None:
        report = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        report(f"there is no {name} here; `make system` installs it")
    return path
