"""Imports point downward only, and each outside library is known to few."""

import ast
import functools
from pathlib import Path

import pytest

import wsserver

PACKAGE = Path(wsserver.__file__).parent

FLOORS = {
    "errors": 0,
    "pieces": 0,
    "content": 0,
    "settings": 0,
    "logs": 0,
    "descriptors": 1,
    "limits": 1,
    "generation": 1,
    "protocol": 1,
    "schema": 2,
    "prices": 1,
    "telemetry": 2,
    "models.base": 2,
    "models.demo": 2,
    "models.anthropic": 2,
    "models.anthropic.events": 2,
    "models.anthropic.failures": 2,
    "models.anthropic.model": 2,
    "models.anthropic.reply": 2,
    "models.anthropic.request": 2,
    "models.anthropic.sdk": 2,
    "models.dial": 2,
    "models.h1": 2,
    "models.http": 2,
    "models.proxy": 2,
    "models.readiness": 2,
    "models.response": 2,
    "models": 2,
    "stores.base": 2,
    "stores.database": 2,
    "stores.fair": 2,
    "stores.memory": 2,
    "stores.migrations": 2,
    "stores.records": 2,
    "stores.rows": 2,
    "stores.sqlite": 2,
    "stores": 2,
    "auth.base": 2,
    "auth.jwks": 2,
    "auth.jwt": 2,
    "auth.tokens": 2,
    "auth": 2,
    "responses": 2,
    "client.failures": 2,
    "client.history": 2,
    "client.connection": 2,
    "client.credentials": 2,
    "client.limits": 2,
    "client.queries": 2,
    "client.replies": 2,
    "client.silence": 2,
    "client.link": 2,
    "client.dial": 2,
    "client.reply": 2,
    "client.reply_content": 2,
    "client.chat": 2,
    "client.sync": 2,
    "client": 2,
    "admission": 3,
    "listening": 3,
    "journal": 3,
    "quota": 3,
    "upkeep": 3,
    "live": 3,
    "context": 3,
    "intake": 3,
    "spending": 3,
    "accounts": 3,
    "cursor": 3,
    "dialects": 3,
    "dialects.base": 3,
    "dialects.v1": 3,
    "following": 3,
    "requests": 3,
    "session": 3,
    "reporting": 3,
    "retention": 3,
    "running": 3,
    "scheduling": 3,
    "conversations": 3,
    "hub": 3,
    "connection": 3,
    "pages": 3,
    "stopping": 3,
    "transport": 3,
    "websocket": 3,
    "routes": 4,
    "server": 4,
    "line_editor": 4,
    "terminal": 5,
    "cli": 5,
    "__main__": 5,
    "": 5,  # the package's public face
}
# Within a floor: what may know what.
NEIGHBOURS = {
    ("settings", "errors"),
    ("pieces", "content"),
    ("protocol", "generation"),
    ("prices", "protocol"),
    ("models.demo", "models.base"),
    ("models.anthropic", "models.anthropic.model"),
    ("models.anthropic.failures", "models.dial"),
    ("models.anthropic.failures", "models.http"),
    ("models.anthropic.failures", "models.response"),
    ("models.anthropic.model", "models.base"),
    ("models.anthropic.model", "models.http"),
    ("models.anthropic.model", "models.response"),
    ("models.anthropic.model", "models.anthropic.events"),
    ("models.anthropic.model", "models.anthropic.failures"),
    ("models.anthropic.model", "models.anthropic.reply"),
    ("models.anthropic.model", "models.anthropic.request"),
    ("models.anthropic.model", "models.anthropic.sdk"),  # only inside a function
    ("models.anthropic.reply", "models.base"),
    ("models.anthropic.reply", "models.anthropic.events"),
    ("models.anthropic.reply", "models.anthropic.failures"),
    ("models.anthropic.request", "models.base"),
    ("models.anthropic.sdk", "models.anthropic.failures"),
    ("models.anthropic.sdk", "models.dial"),
    ("models.anthropic.sdk", "models.http"),
    ("models.anthropic.sdk", "models.proxy"),
    ("models.dial", "models.h1"),
    ("models.dial", "models.proxy"),
    ("models.dial", "models.response"),
    ("models.h1", "models.response"),
    ("models.http", "models.dial"),
    ("models.readiness", "models.base"),
    ("models.http", "models.h1"),
    ("models.http", "models.proxy"),
    ("models.http", "models.response"),
    ("models.anthropic.model", "telemetry"),
    ("models", "models.base"),
    ("models.base", "models.demo"),  # only inside a function, when it is asked for
    ("models.base", "models.anthropic"),
    ("stores", "stores.base"),
    ("stores", "stores.memory"),
    ("stores", "stores.sqlite"),  # only inside a function, when it is asked for
    ("stores.memory", "stores.base"),
    ("stores.sqlite", "stores.base"),
    ("stores.sqlite", "stores.database"),
    ("stores.sqlite", "stores.fair"),
    ("stores.sqlite", "stores.migrations"),
    ("stores.sqlite", "stores.rows"),
    ("stores.rows", "stores.base"),
    ("stores.rows", "stores.records"),
    ("stores.memory", "stores.records"),
    ("auth", "auth.base"),
    ("auth", "auth.tokens"),
    ("auth", "auth.jwt"),  # only inside a function, when it is asked for
    ("auth.tokens", "auth.base"),
    ("auth.jwks", "auth.base"),
    ("auth.jwt", "auth.base"),
    ("auth.jwt", "auth.jwks"),
    ("client.dial", "client.failures"),
    ("client.history", "client.reply"),
    ("client.reply", "client.failures"),
    ("client.reply", "client.reply_content"),
    ("client.link", "client.dial"),
    ("client.link", "client.failures"),
    ("client.connection", "client.credentials"),
    ("client.connection", "client.dial"),
    ("client.connection", "client.failures"),
    ("client.connection", "client.limits"),
    ("client.connection", "client.link"),
    ("client.credentials", "client.dial"),
    ("client.credentials", "client.failures"),
    ("client.credentials", "client.link"),
    ("client.link", "client.limits"),
    ("client.link", "client.silence"),
    ("client.queries", "client.connection"),
    ("client.queries", "client.failures"),
    ("client.queries", "client.link"),
    ("client.replies", "client.connection"),
    ("client.replies", "client.failures"),
    ("client.replies", "client.link"),
    ("client.replies", "client.queries"),
    ("client.replies", "client.reply"),
    ("client.silence", "client.dial"),
    ("client.chat", "client.dial"),
    ("client.chat", "client.failures"),
    ("client.chat", "client.history"),
    ("client.chat", "client.connection"),
    ("client.chat", "client.credentials"),
    ("client.chat", "client.limits"),
    ("client.chat", "client.queries"),
    ("client.chat", "client.replies"),
    ("client.chat", "client.reply"),
    ("client.sync", "client.chat"),
    ("client.sync", "client.history"),
    ("client.sync", "client.connection"),
    ("client.sync", "client.limits"),
    ("client.sync", "client.reply"),
    ("client", "client.chat"),
    ("client", "client.failures"),
    ("client", "client.history"),
    ("client", "client.connection"),
    ("client", "client.credentials"),
    ("client", "client.limits"),
    ("client", "client.reply"),
    ("client", "client.sync"),
    ("live", "journal"),
    ("conversations", "context"),
    ("conversations", "journal"),
    ("conversations", "live"),
    ("intake", "live"),
    ("accounts", "live"),
    ("accounts", "quota"),
    ("accounts", "spending"),
    ("reporting", "live"),
    ("retention", "accounts"),
    ("retention", "journal"),
    ("retention", "live"),
    ("running", "context"),
    ("running", "intake"),
    ("running", "journal"),
    ("running", "live"),
    ("running", "reporting"),
    ("scheduling", "accounts"),
    ("scheduling", "conversations"),
    ("scheduling", "journal"),
    ("scheduling", "live"),
    ("scheduling", "reporting"),
    ("scheduling", "retention"),
    ("scheduling", "running"),
    ("hub", "accounts"),
    ("hub", "conversations"),
    ("hub", "journal"),
    ("hub", "live"),
    ("hub", "reporting"),
    ("hub", "retention"),
    ("hub", "scheduling"),
    ("hub", "upkeep"),
    ("dialects", "dialects.base"),
    ("dialects.base", "live"),
    ("dialects.v1", "live"),
    ("cursor", "dialects"),
    ("cursor", "live"),
    ("session", "admission"),
    ("session", "cursor"),
    ("session", "hub"),
    ("following", "cursor"),
    ("following", "dialects"),
    ("following", "live"),
    ("following", "session"),
    ("stopping", "hub"),
    ("requests", "following"),
    ("requests", "live"),
    ("requests", "pages"),
    ("requests", "session"),
    ("requests", "stopping"),
    ("connection", "admission"),
    ("connection", "dialects.v1"),
    ("connection", "following"),
    ("connection", "requests"),
    ("connection", "session"),
    ("transport", "admission"),
    ("transport", "websocket"),
    ("websocket", "admission"),
    ("transport", "listening"),
    ("connection", "stopping"),
    ("stopping", "live"),
    ("connection", "hub"),
    ("server", "routes"),
    ("__main__", "cli"),
    ("cli", ""),
    ("cli", "terminal"),  # only inside a function, when it is asked for
}
LIBRARIES = {
    "websockets": {
        "responses",
        "routes",
        "transport",
        "websocket",
        "server",
        "client.dial",
        "client.link",
        "client.silence",
    },
    "anthropic": {"models.anthropic.sdk"},
    "httptools": {"models.h1"},
    "sqlite3": {"stores.database", "stores.rows", "stores.sqlite"},
    "httpx2": {"models.anthropic.sdk", "auth.jwks"},
    "jwt": {"auth.jwt"},
    "argparse": {"cli"},
    "uvloop": {"cli"},
    "prompt_toolkit": {"line_editor", "terminal"},
    "structlog": {"logs"},
    "prometheus_client": {"telemetry"},
    "opentelemetry": {"telemetry"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@functools.cache
def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            if node.module != "wsserver":  # `from wsserver import server` needs only that
                names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_floor() -> None:
    assert set(modules()) == set(FLOORS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_downward_only(name: str) -> None:
    for imported in imports(modules()[name]):
        if imported.partition(".")[0] != "wsserver":
            continue
        target = imported.removeprefix("wsserver").removeprefix(".")
        if target not in FLOORS or target == name:
            continue  # a name inside a module
        allowed = FLOORS[target] < FLOORS[name] or (name, target) in NEIGHBOURS
        assert allowed, f"{name} imports {target}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_known_to_its_own_rooms_only(library: str) -> None:
    users = {
        name
        for name, path in modules().items()
        if any(imported.partition(".")[0] == library for imported in imports(path))
    }
    assert users == LIBRARIES[library]


def test_the_public_face_is_this() -> None:
    assert sorted(wsserver.__all__) == [
        "ANONYMOUS",
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
        "serve",
    ]
    assert all(hasattr(wsserver, name) for name in wsserver.__all__)
