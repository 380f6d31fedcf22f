"""Imports point downward and have no cycle. Each outside library has its own rooms.

A room is a module or a package directly inside ``wsserver``. Floors are listed from the ground up.
A floor has wings. A room may import rooms of lower floors, and rooms of its own wing.
"""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

import wsserver

PACKAGE = Path(wsserver.__file__).parent
PUBLIC = "__init__"  # the package's public names
FLOORS: list[dict[str, str]] = [
    {
        "basics": "addresses content descriptors errors limits logs pieces responses settings text",
    },
    {"words": "encoding generation parsing prices protocol schema telemetry wire"},
    {
        "models": "models",
        "stores": "stores",
        "visitors": "admission auth denials names",
        "clients": "client",
    },
    {
        "application": "app chats cluster connections dialects hub page routes",
        "sockets": "sockets",
    },
    {"server": "server", "asgi": "asgi_app asgi_transports"},
    {"programs": f"{PUBLIC} __main__ cli doctor program terminal workers"},
]
LIBRARIES = {
    "aiohappyeyeballs": {"models"},
    "anthropic": {"models"},
    "argparse": {"cli"},
    "asyncpg": {"stores"},
    "httptools": {"models", "sockets"},
    "httpx2": {"auth", "doctor", "models"},
    "jwt": {"auth"},
    "markdown_it": {"terminal"},
    "opentelemetry": {"telemetry"},
    "prometheus_client": {"cluster", "telemetry"},
    "prompt_toolkit": {"terminal"},
    "redis": {"cluster"},
    "rich": {"terminal"},
    "sqlite3": {"stores"},
    "uvloop": {"program"},
    "websockets": {"client", "doctor", "sockets"},
}
PLACES = {
    room: (floor, wing)
    for floor, wings in enumerate(FLOORS)
    for wing, rooms in wings.items()
    for room in rooms.split()
}
HOW_TO_PLACE = (
    "add it to FLOORS in tests/test_rooms.py, on the lowest floor where all that it imports is "
    "below it or in its own wing"
)


@functools.cache
def modules() -> dict[str, Path]:
    """Return the file of each module by its name without ``wsserver.``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or PUBLIC] = path
    return found


def room_of(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def rooms() -> set[str]:
    return {room_of(module) for module in modules()}


@functools.cache
def imports(module: str, *, in_functions: bool = True) -> set[str]:
    """Return the full names that a module imports."""
    names = set()
    nodes: list[ast.AST] = [ast.parse(modules()[module].read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return names


def imported_modules(module: str, *, in_functions: bool = True) -> set[str]:
    """Return the modules of this package that a module imports."""
    found = set()
    for name in imports(module, in_functions=in_functions):
        package, _, inside = name.partition(".")
        if package == "wsserver":
            parent = inside.rpartition(".")[0]
            found.add(next(n for n in (inside, parent, PUBLIC) if n in modules()))
    return found - {module}


def test_every_room_is_on_a_floor() -> None:
    for room in rooms():
        assert room in PLACES, f"{room} has no place: {HOW_TO_PLACE}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downward(module: str) -> None:
    room = room_of(module)
    floor, wing = PLACES[room]
    for other in {room_of(name) for name in imported_modules(module)} - {room}:
        lower, its_wing = PLACES[other]
        assert lower < floor or (lower, its_wing) == (floor, wing), (
            f"{module} ({wing}, floor {floor}) imports {other} ({its_wing}, floor {lower}): "
            f"move one of them, or what they share; for a new room, {HOW_TO_PLACE}"
        )


def test_rooms_have_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {room: set() for room in rooms()}
    for module in modules():
        graph[room_of(module)] |= {room_of(name) for name in imported_modules(module)}
    for room, others in graph.items():
        others.discard(room)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_modules_have_no_import_cycle() -> None:
    """An import inside a function may close a cycle of two modules of one package."""
    graph = {module: imported_modules(module, in_functions=False) for module in modules()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_are_imported_only_by_listed_rooms(library: str) -> None:
    users = {
        room_of(module)
        for module in modules()
        if any(room_of(name) == library for name in imports(module))
    }
    assert users == LIBRARIES[library]


def test_public_names_are_listed() -> None:
    assert sorted(wsserver.__all__) == [
        "ANONYMOUS",
        "Asgi",
        "Authenticator",
        "Code",
        "ConfigError",
        "End",
        "Handshake",
        "Message",
        "Model",
        "ModelError",
        "Principal",
        "PushModel",
        "Request",
        "Server",
        "Settings",
        "Thinking",
        "Unavailable",
        "Usage",
        "asgi",
        "serve",
    ]
    assert all(hasattr(wsserver, name) for name in wsserver.__all__)
