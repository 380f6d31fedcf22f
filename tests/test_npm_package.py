"""The npm package: built, installed in an empty project, type-checked, run and bundled."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import wsserver
from tests.support.puppet import BOUND
from tests.support.sequences import load
from tests.support.tools import ROOT, require_node, require_npm_package
from wsserver import Request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROGRAM = ROOT / "tests/js/npm/program.ts"
MODULES = ("client", "ai-sdk", "react")
ENTRIES = ("wsserver", "wsserver/ai-sdk", "wsserver/react")


def run(*command: str | Path, cwd: Path, input: str | None = None) -> str:  # noqa: A002
    """Run a program, and return its output. Fail with the output if the program fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        input=input,
        capture_output=True,
        text=True,
        timeout=30 * BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_npm_package("typescript")
    dist = tmp_path_factory.mktemp("dist")
    run("make", "--old-file=.tools/npm.stamp", "npm-package", f"DIST={dist}", cwd=ROOT)
    (made,) = dist.glob("*.tgz")
    return made


@pytest.fixture(scope="module")
def project(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the package and React, the AI SDK and Node's types."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    run("npm", "install", "--offline", "--no-audit", "--no-fund", tarball, cwd=folder)
    modules = folder / "node_modules"
    assert [path.name for path in modules.iterdir() if not path.name.startswith(".")] == [
        "wsserver"
    ], "an optional peer is not installed"
    for name in ("ai", "react", "react-dom", "@types"):
        (modules / name).symlink_to(require_npm_package(name))
    shutil.copy(PROGRAM, folder)
    return folder


def compile_program(project: Path, module: str, resolution: str) -> Path:
    options = {
        "strict": True,
        "exactOptionalPropertyTypes": resolution == "bundler",  # not of the types of the AI SDK
        "noUncheckedIndexedAccess": True,
        "noPropertyAccessFromIndexSignature": True,
        "verbatimModuleSyntax": True,
        "skipLibCheck": resolution == "bundler",  # once is enough
        "target": "es2022",
        "lib": ["es2024", "dom", "dom.iterable"],
        "types": ["node", "react"],
        "module": module,
        "moduleResolution": resolution,
        "outDir": resolution,
    }
    config = project / f"tsconfig.{resolution}.json"
    config.write_text(json.dumps({"compilerOptions": options, "files": [PROGRAM.name]}))
    tsc = require_npm_package("typescript") / "bin/tsc"
    run(require_node(), tsc, "--project", config, cwd=project)
    return project / resolution / "program.js"


def test_package_has_version_of_server() -> None:
    package = json.loads((ROOT / "wsserver/web/package.json").read_text())
    assert package["version"] == wsserver.__version__


def test_package_contains_modules_with_types_and_licence(tarball: Path) -> None:
    with tarfile.open(tarball) as archive:
        names = {name.removeprefix("package/") for name in archive.getnames()}
    modules = {f"{name}.{kind}" for name in MODULES for kind in ("js", "d.ts")}
    types = {"blocks.d.ts", "frames.d.ts"}
    assert names == {*modules, *types, "package.json", "README.md", "LICENSE"}
    assert tarball.name == f"wsserver-{wsserver.__version__}.tgz"


def test_publint_finds_no_fault(tarball: Path) -> None:
    publint = require_npm_package("publint") / "src/cli.js"
    run(require_node(), publint, "run", "--strict", tarball, cwd=ROOT)


def test_program_names_every_exported_value(project: Path) -> None:
    listing = f"for (const n of {json.dumps(ENTRIES)}) console.log(...Object.keys(await import(n)))"
    exported = run(require_node(), "--input-type=module", "-e", listing, cwd=project).split()
    assert {"connect", "ChatTransport", "useChat"} <= set(exported)
    named = " ".join(re.findall(r"^import \{(.*)\}", PROGRAM.read_text(), re.MULTILINE))
    assert set(exported) <= set(re.findall(r"\w+", named))


def test_strict_program_compiles_for_bundlers(project: Path) -> None:
    compile_program(project, "esnext", "bundler")


def test_frames_of_the_protocol_have_their_types(project: Path) -> None:
    lines = [line for lines in load().values() for line in lines if "frame" in line]
    sides = {
        side: [x["frame"] for x in lines if x["from"] == side] for side in ("client", "server")
    }
    assert all(sides.values())
    (project / "frames.ts").write_text(
        "import type { ClientFrame, ServerFrame } from 'wsserver'\n"
        f"export const client: ClientFrame[] = {json.dumps(sides['client'])}\n"
        f"export const server: ServerFrame[] = {json.dumps(sides['server'])}\n"
    )
    tsc = require_npm_package("typescript") / "bin/tsc"
    options = ("--noEmit", "--strict", "--module", "node16", "--skipLibCheck")
    run(require_node(), tsc, *options, "frames.ts", cwd=project)


async def endless_on_wait(request: Request) -> AsyncIterator[str]:
    yield "one "
    if request.prompt == "Wait":
        await asyncio.Event().wait()
    yield "two"


async def test_strict_program_compiles_for_node_and_runs(project: Path) -> None:
    compiled = await asyncio.to_thread(compile_program, project, "node16", "node16")
    async with wsserver.serve(endless_on_wait, port=0, drain_timeout=0) as server:
        program = await asyncio.create_subprocess_exec(
            require_node(),
            "--experimental-websocket",
            compiled,
            server.url,
            env={**os.environ, "NODE_NO_WARNINGS": "1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(3 * BOUND):
                out, complaints = await program.communicate()
        finally:
            if program.returncode is None:
                program.kill()
                await program.wait()
    assert program.returncode == 0, complaints.decode()
    seen = json.loads(out)
    assert (seen["text"], seen["reason"]) == ("one two", "end_turn")
    assert (seen["blocks"], seen["tokens"]) == (["one two"], 2)
    assert (seen["stopped"]["reason"], seen["stopped"]["by"]) == ("stopped", "client")
    assert seen["code"] == "not_found"
    assert seen["roles"] == ["user", "assistant"], "`retryOf` replaced the first turn"
    assert seen["title"] == "A name"
    assert seen["chunks"][:2] == ["start", "start-step"]
    assert seen["chunks"][-1] == "finish"
    assert seen["html"] == "<p>ready connecting</p>"


def test_esbuild_bundles_package_for_browsers(project: Path) -> None:
    esbuild = require_npm_package("esbuild") / "bin/esbuild"
    entry = "".join(f"export * from '{name}'\n" for name in ENTRIES)
    options = ("--bundle", "--format=esm", "--platform=browser", "--log-level=warning")
    script = run(esbuild, *options, cwd=project, input=entry)
    bundle = project / "bundle.mjs"
    bundle.write_text(script)
    listing = "console.log(...Object.keys(await import('./bundle.mjs')))"
    exported = run(require_node(), "--input-type=module", "-e", listing, cwd=project).split()
    assert {"connect", "ChatTransport", "useChat"} <= set(exported)


def test_bundle_without_imports_of_package_is_empty(project: Path) -> None:
    esbuild = require_npm_package("esbuild") / "bin/esbuild"
    entry = "import { connect } from 'wsserver'\n"
    assert run(esbuild, "--bundle", "--format=esm", cwd=project, input=entry).strip() == ""
