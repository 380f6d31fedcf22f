"""The wheel and the source distribution: built, installed in an environment of their own, used."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

import wsserver
from tests.support.process import run
from tests.support.puppet import BOUND
from tests.support.tools import ROOT, require_libraries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROGRAM = ROOT / "tests/wheel_user.py"
BUILT = "wsserver/web/libraries/built"
SERVE = ("-m", "wsserver", "serve", "--port", "0", "--store", "memory:", "--demo-rate", "0")


def succeed(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a program, and return its output. Fail with the output if the program fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30 * BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_libraries()
    folder = tmp_path_factory.mktemp("dist")
    succeed("make", "--old-file=.venv/test.stamp", "wheel", f"DIST={folder}", cwd=ROOT)
    return folder


@pytest.fixture
def sources(dist: Path, tmp_path: Path) -> Path:
    """The unpacked source distribution."""
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


def build(sources: Path, **env: str) -> tuple[Path, str]:
    """Build a wheel. Return its path and the output."""
    said = succeed(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=sources, **env)
    (wheel,) = sources.glob("dist/*.whl")
    return wheel, said


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel in a new environment, which has the dependencies of this one. Return Python.

    Python reads no `.pth` file of this environment, so the editable wsserver is not there.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install")
    succeed(*pip, "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = dist.glob("*.whl")
    return install(wheel, tmp_path_factory.mktemp("environment"))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=BOUND) as answer:
        body: bytes = answer.read()
    return body


def test_wheel_contains_documents_and_libraries_with_licences(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    found = names(wheel)
    assert {f"wsserver/{name}" for name in ("PROTOCOL.md", "sequences.jsonl", "py.typed")} <= found
    assert {
        f"{BUILT}/{name}" for name in ("markdown.js", "code.js", "math.js", "LICENSES.txt")
    } <= found
    assert any(name.startswith(f"{BUILT}/fonts/") for name in found)
    folders = {name.partition("/")[0] for name in found}
    assert folders == {"wsserver", f"wsserver-{wsserver.__version__}.dist-info"}


def test_command_of_installed_wheel_shows_help(python: Path, tmp_path: Path) -> None:
    said = succeed(python.with_name("wsserver"), "--help", cwd=tmp_path)
    assert {"serve", "chat", "check"} <= set(said.split())
    said = succeed(python.with_name("wsserver"), "--version", cwd=tmp_path)
    assert said == f"wsserver {wsserver.__version__}\n"


async def test_installed_wheel_serves_page_with_markdown(python: Path, tmp_path: Path) -> None:
    async with run(*SERVE, python=python, cwd=tmp_path) as process:
        page = (await process.line(r"page\s+(http\S+)"))[1]
        assert b"<!doctype html>" in get(page).lower()
        script = get(f"{page}libraries/markdown.js")
        assert re.search(rb"export\s*\{[^}]", script)
        assert b"marked" in get(f"{page}libraries/LICENSES.txt")
        assert len(get(f"{page}libraries/fonts/KaTeX_Main-Regular.woff2")) > 1000
    assert "page without Markdown" not in process.output


def test_strict_program_of_user_is_typed_and_runs(python: Path, tmp_path: Path) -> None:
    program = shutil.copy(PROGRAM, tmp_path)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python)
    succeed(*mypy, "--cache-dir", tmp_path / "cache", program, cwd=tmp_path)
    *_, last = succeed(python, "-W", "error", program, cwd=tmp_path).splitlines()
    seen = json.loads(last)
    assert seen == {
        "text": "user says Hello",
        "thinking": "Hm. ",
        "reason": "end_turn",
        "stopped": "client",
        "code": "overloaded",
        "roles": ["user", "assistant"] * 3,
        "conversations": 1,
        "without a loop": "user says Hello",
        "version": wsserver.__version__,
        "folder": seen["folder"],
    }
    assert Path(seen["folder"]).is_relative_to(python.parents[1])


def test_wheel_of_source_distribution_needs_no_npm(sources: Path, tmp_path: Path) -> None:
    wheel, said = build(sources, PATH=str(tmp_path))
    assert f"{BUILT}/markdown.js" in names(wheel)
    assert "Markdown" not in said


async def test_wheel_built_without_npm_serves_plain_text(sources: Path, tmp_path: Path) -> None:
    shutil.rmtree(sources / BUILT)
    wheel, said = build(sources, PATH=str(tmp_path))
    assert "The page gets no Markdown: npm is not installed" in said
    assert not any(name.startswith(BUILT) for name in names(wheel))
    python = install(wheel, tmp_path / "environment")
    async with run(*SERVE, python=python, cwd=tmp_path) as process:
        page = (await process.line(r"page\s+(http\S+)"))[1]
        for _ in range(2):
            assert b"page.js" in get(page)
            assert get(f"{page}libraries/markdown.js") == b"export {}\n"
        process.process.terminate()
        assert await process.end() == 0
    assert process.output.count("page without Markdown") == 1


def test_damaged_lock_file_leaves_bundles_and_builds_wheel(sources: Path) -> None:
    lock = sources / "wsserver/web/libraries/package-lock.json"
    damaged = re.sub(r'"integrity": "sha512-....', '"integrity": "sha512-AAAA', lock.read_text())
    lock.write_text(damaged)
    before = {path: path.read_bytes() for path in (sources / BUILT).rglob("*.*")}
    wheel, said = build(sources)
    assert "The page gets no Markdown" in said
    assert not any(name.startswith(BUILT) for name in names(wheel)), "they are of other versions"
    assert {path: path.read_bytes() for path in (sources / BUILT).rglob("*.*")} == before
