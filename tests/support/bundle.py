"""Scripts of React for a browser, bundled by esbuild with the packages that the tests install."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import wsserver
from tests.support.puppet import BOUND
from tests.support.tools import ROOT, require_npm_package

__all__ = ["bundle", "example"]


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


@asynccontextmanager
async def example(name: str, server: wsserver.Server, workspace: Path) -> AsyncIterator[str]:
    """Start an example as its ``package.json`` says, on another port; yield its address."""
    packages = require_npm_package("react-dom").parent
    folder = shutil.copytree(ROOT / "examples" / name, workspace / "examples" / name)
    (folder / "node_modules").symlink_to(packages)
    (workspace / "wsserver").symlink_to(ROOT / "wsserver")
    main = (folder / "main.jsx").read_text()
    assert main.count("ws://localhost:3001") == 1
    (folder / "main.jsx").write_text(main.replace("localhost:3001", f"localhost:{server.port}"))
    command = json.loads((folder / "package.json").read_text())["scripts"]["start"]
    assert command.count("--serve=8000") == 1
    process = await asyncio.create_subprocess_shell(
        f"exec {command.replace('--serve=8000', '--serve=0')}",
        cwd=folder,
        env={**os.environ, "PATH": f"{packages}/.bin:{os.environ['PATH']}"},
        stdin=asyncio.subprocess.PIPE,  # esbuild ends with its input
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(BOUND):
            started = await process.stderr.readuntil(b"/\n")
        yield started.decode().split()[-1]
    finally:
        process.kill()
        await process.communicate()
