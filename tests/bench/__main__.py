"""Compares this server with others, on this machine and in one run: see `--help`."""

import argparse
import os
import shutil
import statistics
import sys
from collections import defaultdict
from time import monotonic

from tests.bench.load import Failure, Load, raise_limit
from tests.bench.servers import INSTALLED, PEERS, SERVERS, Running, Upstream, cpu, serve, upstream

Figures = dict[str, float]


class Stand:
    """One server, one upstream and the clients, and what they have used."""

    def __init__(self, running: Running, model: Upstream, *, quick: bool) -> None:
        self.running = running
        self.upstream = model
        self.quick = quick
        self.figures: Figures = {}

    def window(self, load: Load, seconds: float) -> tuple[float, float]:
        """Read for so long; return how many seconds it was, and the server's CPU.

        Notes the CPU of upstream and load as shares of a core.
        """
        began = monotonic()
        before = self.running.program.cpu(), cpu(self.upstream.program.pid), cpu(os.getpid())
        load.run(seconds)
        took = monotonic() - began
        after = self.running.program.cpu(), cpu(self.upstream.program.pid), cpu(os.getpid())
        self.running.program.check()
        server, model, own = (b - a for a, b in zip(before, after, strict=True))
        self.figures |= {"server": server / took, "upstream": model / took, "load": own / took}
        return took, server


def relay(stand: Stand, streams: int, rate: float) -> Figures:
    """So many streams at a model's pace."""
    stand.upstream.plan(rate=rate)
    load = Load(stand.running.url, stamps=True)
    clients = load.connect(streams)
    for client in clients:
        client.prompt(f"go #{client.number}")
    load.run(0.5)
    load.until(lambda: any(c.first_at for c in clients), "a first token")
    load.run(1.5)
    load.latencies = []
    tokens, frames = load.tokens, load.frames
    each = [client.tokens for client in clients]
    took, server = stand.window(load, 2 if stand.quick else 5)
    tokens, frames = load.tokens - tokens, load.frames - frames
    full = sum(
        client.tokens - before >= 0.9 * rate * took
        for client, before in zip(clients, each, strict=True)
    )
    load.close()
    return {
        "us": server / tokens * 1e6,
        "tokens": tokens / took,
        "frames": frames / took,
        "full": full,
        "p50": statistics.median(load.latencies) * 1e3,
        "p99": statistics.quantiles(load.latencies, n=100)[98] * 1e3,
    }


def throughput(stand: Stand) -> Figures:
    """A model that is faster than the wire; each reply is followed by one on a new connection."""
    stand.upstream.plan(tokens=10_000)
    load = Load(stand.running.url, stamps=True)

    def again(client: object) -> None:
        load.close([client])  # type: ignore[list-item]
        load.open(prompt=f"go #{load.serial + 1}")

    load.on_over = again
    for _ in range(50):
        load.open(prompt=f"go #{load.serial + 1}")
    load.until(lambda: load.tokens > 0, "a first token")
    load.run(1)
    tokens, frames = load.tokens, load.frames
    took, server = stand.window(load, 2 if stand.quick else 5)
    tokens, frames = load.tokens - tokens, load.frames - frames
    load.close()
    return {"tokens": tokens / took, "frames": frames / took, "us": server / tokens * 1e6}


CASES = {
    "cpu100": lambda stand: relay(stand, 100, 50),
    "cpu500": lambda stand: relay(stand, 500, 30),
    "throughput": throughput,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--servers", default="wsserver,bun")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    raise_limit()
    for path in PEERS.iterdir():
        shutil.copy(path, INSTALLED)
    found: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    with upstream() as model:
        for _ in range(options.rounds):
            for case in options.only.split(","):
                for name in options.servers.split(","):
                    with serve(SERVERS[name], model.url) as running:
                        stand = Stand(running, model, quick=options.quick)
                        figures = CASES[case](stand) | stand.figures
                    found[case, name].append(figures)
                    shown = ", ".join(f"{k} {v:,.2f}" for k, v in figures.items())
                    print(f"{case} {name}: {shown}", file=sys.stderr)
    for (case, name), rounds in found.items():
        medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        print(f"{case:12} {name:10}", *(f"{k} {v:,.2f}" for k, v in medians.items()))


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(str(failure))
