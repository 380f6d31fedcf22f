"""The sequences of ``PROTOCOL.md`` as test vectors; ``tests/conformance.md`` describes them."""

import json
import re
from pathlib import Path
from typing import Any

import wsserver

__all__ = [
    "VECTORS",
    "Frame",
    "Line",
    "alike",
    "load",
    "playable",
    "renamed",
    "written",
]

Frame = dict[str, Any]
Line = dict[str, Any]

DOCUMENT = Path(wsserver.__file__).parent / "PROTOCOL.md"
VECTORS = Path(wsserver.__file__).parent / "sequences.jsonl"
EVENTS = {
    "(the connection is lost)": {"event": "lost"},
    "(a new connection)": {"event": "connected"},
    "(the token expires)": {"event": "expired"},
    "(2,880 s later)": {"event": "later"},
    "(the server crashes and restarts)": {"event": "crashed"},
    "(the server begins to shut down)": {"event": "draining"},
}
"""What happens besides frames, as the document says it and as the vectors do."""

ANY = "…"  # stands for any text
TIMES = frozenset(
    {"expires", "expires_in", "created", "updated", "began", "ended", "retry_after", "thought"}
)


def written() -> list[str]:
    """Return the lines of the sequences in ``PROTOCOL.md``."""
    section = DOCUMENT.read_text().partition("\n## Sequences\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^### ([^\n]*)\n.*?^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [
        json.dumps({"sequence": title, **_line(line)}, ensure_ascii=False)
        for title, block in blocks
        for line in block.splitlines()
    ]


def _line(line: str) -> Line:
    if line in EVENTS:
        return EVENTS[line]
    if (closed := re.fullmatch(r"\(2?close (\d+)\)", line)) is not None:
        return {"socket": 1, "event": "closed", "code": int(closed[1])}
    way = re.fullmatch(r"(2?)([→←⇠]) (\{.*\})", line)
    assert way is not None, line
    text = re.sub(r'"(ID\d?|[CD])"', r'"\1-0123456789abcdef"', way[3])
    vector = {"socket": int(way[1] or 1), "from": "client" if way[2] == "→" else "server"}
    crossing = {"crossing": True} if way[2] == "⇠" else {}
    return {**vector, **crossing, "frame": json.loads(text)}


def load() -> dict[str, list[Line]]:
    """Return the lines of the vectors by the name of the sequence."""
    sequences: dict[str, list[Line]] = {}
    for line in VECTORS.read_text().splitlines():
        vector = json.loads(line)
        sequences.setdefault(vector.pop("sequence"), []).append(vector)
    return sequences


def alike(seen: Any, told: Any, key: str = "") -> bool:
    """Whether a value matches the value of a vector."""
    if told == ANY:
        return isinstance(seen, str) and bool(seen)
    if key in TIMES:
        return isinstance(seen, int | float) and seen >= 0
    if isinstance(told, dict):
        guessed = told.get("estimated") is True
        return (
            isinstance(seen, dict)
            and seen.keys() == told.keys()
            and all(
                (guessed and isinstance(seen[name], int)) or alike(seen[name], told[name], name)
                for name in told
            )
        )
    if isinstance(told, list):
        return isinstance(seen, list) and len(seen) == len(told) and all(map(alike, seen, told))
    return bool(seen == told)


def renamed(value: Any, names: dict[str, str]) -> Any:
    """Return a value with other ids."""
    if isinstance(value, dict):
        return {key: renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def playable(unable: frozenset[str]) -> list[tuple[str, int]]:
    """Return the sequences, and the sockets in them, that a client can play.

    Args:
        unable: what the client cannot do: types of frames, ``messages`` and events.
    """
    found = []
    for name, lines in load().items():
        for socket in {line["socket"] for line in lines if line.get("from") == "client"}:
            own = [line for line in lines if line.get("socket", socket) == socket]
            does: set[str] = set()
            ids: set[str | None] = set()
            for line in own:
                does.add(line.get("event", ""))
                if line.get("frame", {}).get("code") == "unauthenticated" and not ids - {None}:
                    does.add("stranger")
                if line.get("event") == "connected":
                    ids.clear()
                if line.get("from") == "client":
                    frame = line["frame"]
                    does |= {frame.get("type", "messages" if "messages" in frame else "prompt")}
                    if frame.get("type") == "open" and "before" in frame:
                        does.add("page")
                    if isinstance(frame.get("prompt"), list):
                        does.add("blocks")
                    if "prompt" in frame and frame.get("id") in ids:
                        does.add("repeat")
                    if frame.get("retry_of", "") not in {"", *ids}:
                        does.add("foreign")
                    ids.add(frame.get("id"))
            if not does & unable:
                found.append((name, socket))
    return found
