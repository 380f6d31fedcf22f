"""Programs that tests run, such as a browser. `make system` installs them."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

__all__ = [
    "ROOT",
    "require_caddy",
    "require_chromium",
    "require_haproxy",
    "require_nginx",
    "require_node",
    "require_npm_package",
    "require_systemd",
    "require_wscat",
]


def require_chromium() -> str:
    """Return the path of a program. Without the program skip the test, or fail it on CI."""
    return _require("chromium", shutil.which("chromium") or shutil.which("chromium-browser"))


def require_wscat() -> str:
    """Return the path of a program. Without the program skip the test, or fail it on CI."""
    own = shutil.which("wscat", path=ROOT / ".tools/node_modules/.bin")
    return _require("wscat", own or shutil.which("wscat"))


def require_nginx() -> str:
    """Return the path of a program. Without the program skip the test, or fail it on CI."""
    return _require("nginx", _which("nginx"))


def require_haproxy() -> str:
    """Return the path of a program. Without the program skip the test, or fail it on CI."""
    return _require("haproxy", _which("haproxy"))


def require_caddy() -> str:
    """Return the path of a program. Without the program skip the test, or fail it on CI."""
    return _require("caddy", _which("caddy"))


def require_systemd(tool: str) -> str:
    """Return the path of one of its tools. Where there is none, skip the test, or on CI fail it."""
    return _require(tool, _which(tool))


def _which(name: str) -> str | None:
    # Not every user has the folders of what administrators use.
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def require_node() -> str:
    """Return the path of a program. Without the program skip the test, or fail it on CI."""
    return _require("node", shutil.which("node") or shutil.which("nodejs"))


def require_npm_package(name: str) -> Path:
    """Return its folder. Where it is not installed, skip the test, or on CI fail it."""
    folder = ROOT / ".tools/node_modules" / name
    return Path(_require(name, str(folder) if folder.is_dir() else None))


def require_libraries() -> None:
    """Skip the test if the page was built without npm; on CI fail it."""
    folder = ROOT / "wsserver/web/libraries/built"
    _require("libraries of the page", str(folder) if folder.is_dir() else None)


def _require(name: str, path: str | None) -> str:
    if path is None:
        report = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        report(f"there is no {name} here; `make system` installs it")
    return path
