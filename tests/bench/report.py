"""Format the measured figures as Markdown, for a terminal and for RESULTS.md."""

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.servers import DEMO, MODULES, PEERS, PYTHON, SERVERS, TRANSPORTS

Figures = dict[str, float]
RESULTS = Path(__file__).parent / "RESULTS.md"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- {} -->", "<!-- /{} -->"


class Results:
    """The figures of all rounds."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        self.failures: dict[tuple[str, str], str] = {}

    def add(self, case: str, server: str, figures: Figures) -> None:
        for figure, value in figures.items():
            self.found[case, server, figure].append(value)

    def failed(self, case: str, server: str, why: str) -> None:
        self.failures[case, server] = why

    def median(self, case: str, server: str, figure: str) -> float:
        """Return the median of all rounds; nan if there was no round."""
        values = self.found.get((case, server, figure))
        return statistics.median(values) if values else math.nan


@dataclass(frozen=True)
class Row:
    """A row of the table: one figure of one case, and its goal."""

    title: str
    case: str
    figure: str
    goal: str = ""
    digits: int = 1
    ours: str = "wsserver"  # name of our server in this case


ROWS = (
    Row("CPU per token, 100 × 50/s (µs)", "cpu100", "us", "≤ 0.75 × Bun, ≤ 0.2 × FastAPI"),
    Row("CPU per prompt of ten tokens (ms)", "first", "cpu", "≤ 0.5", 2),
    Row("CPU per token, 500 × 30/s (µs)", "cpu500", "us", "≤ 0.8 × Bun"),
    Row("… streams at full pace", "cpu500", "full", "all 500", 0),
    Row("tokens/s, 50 × no pause", "throughput", "tokens", "≥ 3 × Bun, ≥ 20 × FastAPI", 0),
    Row("added latency, 100 × 50/s, p50 (ms)", "cpu100", "p50", "", 2),
    Row("… p99", "cpu100", "p99", "≤ 1.5 × Bun", 2),
    Row("first token, 100 prompts at once, p50 (ms)", "first", "p50", "≤ 1.2 × Bun"),
    Row("… p99", "first", "p99"),
    Row("stop sent → upstream closed, 200 streams, p50 (ms)", "stop", "p50", "", 2),
    Row("… p99", "stop", "p99", "≤ 1.5, and ≤ every peer", 2),
    Row("tokens that the model made after 100 stops, 200/s", "after_stop", "tokens", "", 0),
    Row("pieces lost over 100 replies, cut and resumed", "resumed", "lost", "0", 0),
    Row("… doubled", "resumed", "doubled", "0", 0),
    Row("memory per idle connection (KiB)", "memory", "idle", "≤ 4.2"),
    Row("memory per running stream (KiB)", "memory", "running", "≤ 20"),
    Row("start → answers on its port (s)", "start", "start", "≤ 0.7", 2),
    Row("… with the demo model", "start", "start", "≤ 0.5", 2, DEMO),
)
# The columns and rows of the table in the README.
TITLES = {
    "wsserver": "wsserver",
    "bun": "Bun",
    "node": "Node, `ws`",
    "ai-sdk": "AI SDK over `ws`",
    "ai-sdk-resume": "AI SDK, resumable",
    "fastapi": "FastAPI",
}
SHORT = (
    Row("tokens that the model made after 100 stops", "after_stop", "tokens", digits=0),
    Row("pieces lost over 100 replies, cut and resumed", "resumed", "lost", digits=0),
    Row("stop sent → upstream closed, p99 (ms)", "stop", "p99"),
    Row("added latency, p99 (ms)", "cpu100", "p99"),
    Row("first token of 100 prompts at once, p50 (ms)", "first", "p50"),
    Row("CPU per token (µs)", "cpu100", "us"),
    Row("CPU per prompt of ten tokens (ms)", "first", "cpu", digits=2),
    Row("memory of an idle connection (KiB)", "memory", "idle"),
)
TRANSPORT_ROWS = (
    Row("CPU per token (µs)", "cpu100", "us", "SSE ≤ 1.15 × WebSocket"),
    Row("CPU per prompt of ten tokens (ms)", "first", "cpu", digits=2),
    Row("first token of 100 prompts at once, p50 (ms)", "first", "p50"),
    Row("added latency, p50 (ms)", "cpu100", "p50", digits=2),
    Row("added latency, p99 (ms)", "cpu100", "p99", digits=2),
    Row("bytes per token of 19 characters", "cpu100", "bytes", digits=0),
    Row("memory of an idle connection (KiB)", "memory", "idle"),
    Row("memory of a running stream (KiB)", "memory", "running"),
    Row("stop or abort → upstream closed, 200 streams, p50 (ms)", "stop", "p50", digits=2),
    Row("stop or abort → upstream closed, 200 streams, p99 (ms)", "stop", "p99", "≤ 5", 2),
)
GROWTH = (
    ("10 to 1,000 streams", ("10 streams", "100 streams", "1,000 streams")),
    ("100 to 100,000 tokens of a reply", ("after 100 tokens", "after 100,000 tokens")),
)
SHARES = ("server", "system", "upstream", "load")
BUSY = ("cpu100", "cpu500", "throughput")


def number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def ratio(ours: float, theirs: float) -> str:
    return number(ours / theirs, 2) if theirs else "–"


def lines(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(r, widths, strict=True)] for r in rows]
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))


def table(results: Results, names: Sequence[str]) -> str:
    """Return all tables, as Markdown."""

    def cell(row: Row, name: str) -> str:
        name = row.ours if name == "wsserver" else name if row.ours == "wsserver" else ""
        if (row.case, name) in results.failures:
            return "failed"
        if row.case == "resumed" and not SERVERS[name].resumes:
            return "no resume"
        values = results.found.get((row.case, name, row.figure), [])
        text = number(results.median(row.case, name, row.figure), row.digits)
        if len(values) > 1 and max(values) != min(values):
            text += f" ({number(min(values), row.digits)}–{number(max(values), row.digits)})"
        return text

    shown = []
    for row in ROWS:
        if not any((row.case, name, row.figure) in results.found for name in (*names, row.ours)):
            continue
        ours = results.median(row.case, row.ours, row.figure)
        peers = [results.median(row.case, peer, row.figure) for peer in ("bun", "fastapi")]
        ratios = [ratio(ours, theirs) for theirs in peers]
        shown.append([row.title, *(cell(row, name) for name in names), *ratios, row.goal])
    parts = []
    if shown:
        counts = [f"{SERVERS[name].lines():,}" for name in names]
        shown.append(["lines of code (a peer: one program)", *counts, "", "", ""])
        heads = ["median (least–most of the rounds)", *names, "÷ Bun", "÷ FastAPI", "goal"]
        parts.append(lines([heads, *shown]))
    growth = []
    for title, cases in GROWTH:
        costs = [results.median(case, "wsserver", "us") for case in cases]
        if not math.isnan(sum(costs)):
            found = ", ".join(f"{c}: {cost:.1f}" for c, cost in zip(cases, costs, strict=True))
            growth.append([title, found, f"{max(costs) / min(costs) - 1:.0%}", "≤ 20 %"])
    if growth:
        heads = ["growth of wsserver's CPU per token (µs)", "", "most above least", "goal"]
        parts.append(lines([heads, *growth]))
    if any(
        (row.case, name, row.figure) in results.found
        for row in TRANSPORT_ROWS
        for name in TRANSPORTS
    ):
        parts.append(transports_table(results))
    busy = [
        [
            case,
            name,
            f"{results.median(case, name, 'tokens'):,.0f}",
            f"{results.median(case, name, 'frames'):,.0f}",
            f"{results.median(case, name, 'us'):,.1f}",
            *(f"{results.median(case, name, part):.0%}" for part in SHARES),
        ]
        for case in (*BUSY, *(case for _, cases in GROWTH for case in cases))
        for name in (*names, *TRANSPORTS)
        if (case, name, "server") in results.found
    ]
    if busy:
        heads = ["CPU use", "", "tokens/s", "frames/s", "µs per token"]
        heads += ["server", "server's system calls", "upstream", "clients"]
        parts.append(lines([heads, *busy]))
        parts.append("100% is one core.")
    others = [
        share for key, found in results.found.items() if key[2] == "others" for share in found
    ]
    if others:
        parts.append(
            f"Other programs of the machine used {statistics.median(others):.0%} of a core in the "
            f"median case, {max(others):.0%} at most. If this share is not small, the figures are "
            "not reliable."
        )
    parts += [
        f"- {case}, {name}: {why.strip().splitlines()[0]}"
        for (case, name), why in results.failures.items()
    ]
    return "\n\n".join(parts)


def versions() -> str:
    """Return the versions of all servers and libraries."""

    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return "none"
        return done.stdout.strip()

    ours = ("wsserver", "websockets", "anthropic", "httptools", "uvloop")
    parts = [f"Python {platform.python_version()}"]
    for name in ours:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    peers = [f"Bun {output(str(MODULES / '.bin' / 'bun'), '--version')}"]
    peers += [f"Node {output('node', '--version').removeprefix('v')}"]
    for name in json.loads((PEERS / "package.json").read_text())["dependencies"]:
        package = MODULES / name / "package.json"
        if package.exists() and name != "bun":
            peers.append(f"{name} {json.loads(package.read_text())['version']}")
    asked = "import sys; from importlib.metadata import version as v;"
    asked += "print(*(f'{n} {v(n)}' for n in sys.argv[1:]), sep=', ')"
    listed = ("fastapi", "starlette", "uvicorn", "uvloop", "websockets", "anthropic")
    peers.append(output(str(PYTHON), "-c", asked, *listed))
    return f"wsserver: {', '.join(parts)}. Peers: {', '.join(peers)}."


def machine() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = found[1] if found else platform.machine()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}"


def between_marks(path: Path, text: str, name: str = "results") -> None:
    """Replace the text between the marks of a name in a file."""
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = path.read_text().partition(begin)
    if found:
        path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def write(text: str, rounds: int, name: str = "results") -> None:
    """Write a text to RESULTS.md, between the marks of a name."""
    command = " ".join(["python -m tests.bench", *sys.argv[1:]])
    about = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}. {versions()} `{command}`: {rounds} rounds."
    between_marks(RESULTS, f"{about}\n\n{text}", name)


def short_table(results: Results, names: Sequence[str]) -> str:
    """Return the medians that the README shows, as Markdown."""
    rows = [["", *(TITLES[name] for name in names)]]
    for row in SHORT:
        values = []
        for name in names:
            if row.case == "resumed" and not SERVERS[name].resumes:
                values.append("no resume")
            else:
                values.append(number(results.median(row.case, name, row.figure), row.digits))
        rows.append([row.title, *values])
    return lines(rows)


def transports_table(results: Results) -> str:
    """Return the medians of each transport, as Markdown."""
    rows = [["one server, by transport", *TRANSPORTS, "goal"]]
    for row in TRANSPORT_ROWS:
        values = [results.median(row.case, name, row.figure) for name in TRANSPORTS]
        cells = [number(value, row.digits) for value in values]
        rows.append([row.title, *cells, row.goal])
    return lines(rows)
