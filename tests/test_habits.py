"""The habits that CONTRIBUTING.md describes are kept."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_pre_commit_runs_the_commands_of_make_lint() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    commands = recipe[1].replace("$(BIN)", ".venv/bin").split("\n\t")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.*)", hooks) == [command.strip() for command in commands]


def test_contributing_make_targets_exist() -> None:
    targets = set(re.findall(r"`make (\w[\w-]*)", CONTRIBUTING))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "wsserver/ARCHITECTURE.md"])
def test_files_named_in_document_exist(document: str) -> None:
    folders = (ROOT, ROOT / "wsserver", ROOT / "examples")
    names = re.findall(r"\b(?:[\w]+/)*\w+\.(?:py|md)\b", (ROOT / document).read_text())
    assert names
    for name in names:
        assert any((folder / name).exists() for folder in folders), name


def test_readme_has_at_most_160_lines() -> None:
    assert "at most 160 lines" in CONTRIBUTING
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_contributing_pythons_equal_make_pythons() -> None:
    pythons = re.search(r"^PYTHONS := (.*)$", MAKEFILE, re.MULTILINE)
    assert pythons is not None
    *others, last = pythons[1].split()
    assert f"{', '.join(others)} and {last}" in CONTRIBUTING


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: p.name)
def test_test_file_has_at_most_700_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 700


def test_safety_names_existing_tests() -> None:
    safety = (ROOT / "wsserver" / "SAFETY.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", safety)):
        assert f"def {name}(" in source, name
