"""Makes API.md from the docstrings of the public names."""

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from typing import Any

import wsserver
import wsserver.client
import wsserver.content

PACKAGES = (wsserver, wsserver.client, wsserver.content)
HEAD = """# Python API

For developers of Python programs: the public names of `wsserver`, `wsserver.client` and
`wsserver.content`.
[models.md](../examples/models.md) and [clients.md](../examples/clients.md) show them in use.
"""
WIDTH = 100  # characters of a signature on one line


def reference() -> str:
    """Return the text of API.md."""
    parts = [HEAD]
    told: set[object] = set()
    for package in PACKAGES:
        parts.append(f"## {package.__name__}\n\n{prose(package)}")
        for name in sorted(package.__all__, key=str.lower):
            value = getattr(package, name)
            if not callable(value) or (key := id(value)) in told:
                continue
            told.add(key)
            parts.append(f"### {package.__name__}.{name}\n\n{described(name, value)}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def described(name: str, value: Any) -> str:
    parts = [signature(name, value), prose(value)]
    if inspect.isclass(value):
        parts += [f"{code}\n\n{text}" for code, text in members(value)]
    return "\n\n".join(part for part in parts if part)


def signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and (
        issubclass(value, enum.Enum | BaseException) or getattr(value, "_is_protocol", False)
    ):
        return ""
    try:
        given = inspect.signature(value)
    except ValueError:
        return ""
    return call(name, given.replace(return_annotation=given.empty))


def call(name: str, given: inspect.Signature) -> str:
    """Return a call with its types, as a block of code."""
    shown = []
    named = False  # whether all further parameters are given by name only
    for parameter in given.parameters.values():
        if parameter.name in {"self", "cls"}:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            shown.append("*")
        named |= parameter.kind in {parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL}
        shown.append(str(parameter))
    result = inspect.formatannotation(given.return_annotation)
    result = "" if given.return_annotation in {given.empty, None} else f" -> {result}"
    text = f"{name}({', '.join(shown)}){result}"
    if len(text) > WIDTH:
        text = f"{name}(\n    " + ",\n    ".join(shown) + f",\n){result}"
    return block(text)


def block(text: str) -> str:
    text = re.sub(r"(\*\*\w+): \*<class '[\w.]+'>", r"\1", text)
    text = re.sub(r"<factory>|<object object at 0x\w+>", "…", text)
    text = text.replace(inspect.formatannotation(wsserver.content.Block), "Block")
    text = re.sub(r"\b(?:collections\.abc|typing|wsserver(?:\.\w+)*)\.(?=[A-Z])", "", text)
    return f"```\n{text}\n```"


def members(value: type) -> Iterator[tuple[str, str]]:
    """Yield the methods and properties that have a docstring of their own, as code and text."""
    fields = (
        {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    )
    of = re.findall(r"[A-Z][a-z]*", value.__name__)[-1].lower()  # such as `chat` of a `SyncChat`
    for name, member in inspect.getmembers(value):
        if name.startswith("_") or name in fields or name not in names_of(value):
            continue
        text = prose(member)
        if isinstance(member, property):
            result = inspect.signature(member.fget).return_annotation  # type: ignore[arg-type]
            yield block(f"{of}.{name}: {inspect.formatannotation(result)}"), text
        elif inspect.isroutine(member) and text:
            waits = "await " if inspect.iscoroutinefunction(member) else ""
            yield call(f"{waits}{of}.{name}", inspect.signature(member)), text


def names_of(value: type) -> set[str]:
    """Return the names that classes of this project define."""
    return {
        name
        for base in value.__mro__
        if base.__module__.startswith("wsserver")
        for name in vars(base)
    }


def prose(value: Any) -> str:
    """Return a docstring as Markdown."""
    if inspect.isclass(value) and "__doc__" not in vars(value):
        return ""
    text = inspect.getdoc(value) or ""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"^::\n\n((?:    .*\n|\n)+?)(?=\S|\Z)", fenced, text + "\n", flags=re.MULTILINE)
    lines, listed = [], False
    for line in text.splitlines():
        if line in {"Args:", "Attributes:", "Raises:", "Returns:"}:
            listed = True
            lines += ["", line, ""]
            continue
        if line and not line.startswith(" "):
            listed = False
        lines.append(item(line) if listed else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def item(line: str) -> str:
    """Return a line of a list of arguments or errors."""
    line = re.sub(r"^ {4}(\*{0,2}\w+(?:, \w+)*): ", r"- `\1`: ", line)
    return re.sub(r"^ {8}", "  ", line).removeprefix("    ")


def fenced(match: re.Match[str]) -> str:
    return f"```python\n{inspect.cleandoc(match[1])}\n```\n\n"
