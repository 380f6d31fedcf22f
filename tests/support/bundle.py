"""Scripts of React for a browser, bundled by esbuild with the packages that the tests install."""

import os
import subprocess

from tests.support.puppet import BOUND
from tests.support.tools import ROOT, require_npm_package

__all__ = ["bundle"]


def bundle(entry: str) -> str:
    """Return a script of a module that may import the project's files and packages of npm."""
    packages = require_npm_package("react-dom").parent
    built = subprocess.run(
        [
            require_npm_package("esbuild") / "bin/esbuild",
            "--bundle",
            "--loader=jsx",
            "--jsx=automatic",
            "--jsx-dev",
        ],
        input=entry,
        cwd=ROOT,
        env={**os.environ, "NODE_PATH": str(packages)},
        capture_output=True,
        timeout=6 * BOUND,
        check=True,
        text=True,
    )
    return built.stdout
