"""Bundles the page's libraries from npm when a package or an editable installation is built.

The lock file pins the versions and the hashes of the packages. Without npm, or without a network,
the installation has a page without Markdown. A source distribution has the bundles: to build a
wheel of it, npm is not needed.
"""

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "wsserver/web/libraries"
BUNDLES = ("markdown", "code", "math")
INPUTS = ("package.json", "package-lock.json", *(f"{name}.entry.js" for name in BUNDLES))
LIMIT = 300  # seconds for npm

# KaTeX offers each font in three formats. Every browser that can show the page knows woff2.
OLD_FONTS = re.compile(r',url\([^)]*\) format\("(?:woff|truetype)"\)')


class CustomBuildHook(BuildHookInterface[Any]):
    """The hook of hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Bundle the libraries, unless the bundles are newer than all inputs."""
        folder = Path(self.root, FOLDER)
        inputs = [*(folder / name for name in INPUTS), Path(__file__)]
        digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in inputs)).hexdigest()
        stamp = folder / "built" / "stamp"
        if not stamp.is_file() or stamp.read_text() != digest:
            try:
                build(folder)
            except (OSError, subprocess.SubprocessError) as error:
                self.app.display_warning(f"The page gets no Markdown: {error}")
                return
            stamp.write_text(digest)
        build_data["artifacts"].append(f"{FOLDER}/built/**")


def build(folder: Path) -> None:
    """Write the bundles.

    Raises:
        OSError: npm is not installed.
        SubprocessError: npm or esbuild failed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        work, made = Path(temporary), Path(temporary, "built")
        for name in INPUTS:
            shutil.copy(folder / name, work)
        run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=work)
        run(
            "node_modules/.bin/esbuild",
            *(f"{name}={name}.entry.js" for name in BUNDLES),
            f"--outdir={made}",
            *("--bundle", "--minify", "--format=esm", "--target=es2022", "--legal-comments=none"),
            cwd=work,
        )
        katex = work / "node_modules" / "katex" / "dist"
        style = OLD_FONTS.sub("", (katex / "katex.min.css").read_text())
        (made / "math.css").write_text(style)
        (made / "fonts").mkdir()
        for font in katex.glob("fonts/*.woff2"):
            shutil.copy(font, made / "fonts")
        shipped = json.loads((work / "package.json").read_text())["dependencies"]
        (made / "LICENSES.txt").write_text(licences(work / "node_modules", shipped))
        shutil.rmtree(folder / "built", ignore_errors=True)
        shutil.copytree(made, folder / "built")


def run(*command: str, cwd: Path) -> None:
    """Run a program.

    Raises:
        SubprocessError: it failed, or took too long.
    """
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=LIMIT)  # noqa: S603


def licences(modules: Path, packages: Iterable[str]) -> str:
    """Return the licences of packages."""
    return "\n\n".join(
        f"{name}\n{'=' * len(name)}\n\n{path.read_text().strip()}\n"
        for name in packages
        for path in sorted((modules / name).glob("LICEN*"))
    )
