"""Compare this server with others, on this machine and in one run.

::

    python -m tests.bench              # all cases, about 20 minutes
    python -m tests.bench --quick      # about one minute
    python -m tests.bench --only cpu100,stop --servers wsserver,bun --rounds 5
    python -m tests.bench --promises   # what a stop and a lost connection cost, in two minutes
    python -m tests.bench --only transports    # WebSocket, SSE and the AI SDK, here and in uvicorn

Each case starts a new process of a server. All cases share one fake of the model's API
(`tests/bench/upstream.py`). The clients run in this process (`tests/bench/load.py`). The servers
take turns in several rounds, so that other programs on the machine disturb all servers alike.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from time import monotonic

from tests.bench.load import Client, Failure, Load, quantile, raise_limit
from tests.bench.promises import after_stop, resumed
from tests.bench.report import (
    README,
    RESULTS,
    Figures,
    Results,
    between_marks,
    short_table,
    table,
    transports_table,
    write,
)
from tests.bench.servers import (
    DEMO,
    INSTALLED,
    PEERS,
    SERVERS,
    TRANSPORTS,
    Running,
    Upstream,
    busy,
    cpu,
    serve,
    system_time,
    upstream,
)

STEP = 0.25  # seconds between two checks


class Stand:
    """The server and the upstream of one case, and the seconds to measure."""

    def __init__(self, running: Running, model: Upstream, seconds: float) -> None:
        self.running = running
        self.server = running.program
        self.upstream = model
        self.seconds = seconds
        self.began = self._spent()

    def _spent(self) -> list[float]:
        """Return the time, and the CPU seconds of the machine, server, upstream and clients."""
        own = [cpu(self.upstream.program.pid), cpu(os.getpid())]
        return [monotonic(), busy(), self.server.cpu(), *own]

    def others(self) -> float:
        """Return the average number of cores that other programs used since the start."""
        spent = zip(self.began, self._spent(), strict=True)
        took, whole, *known = (b - a for a, b in spent)
        return max(0.0, whole - sum(known)) / took

    def load(self) -> Load:
        return self.running.server.clients(self.running.url)

    def window(self, load: Load) -> Figures:
        """Read for some seconds; return the cost of a token and the CPU use of the processes.

        Returns:
            `us`: microseconds of the server's CPU per token. `tokens`, `frames`: per second.
            `bytes`: received per token, framing included.
            `took`: seconds. `server`, `system`, `upstream`, `load`: cores that the server, its
            system calls, the upstream and the clients used.
        """

        def counts() -> list[float]:
            found = [system_time(self.server.pid), load.tokens, load.frames, load.bytes]
            return [*found, *self._spent()]

        before = counts()
        load.run(self.seconds)
        after = counts()
        self.server.check()
        system, tokens, frames, size, took, _, server, model, clients = (
            b - a for a, b in zip(before, after, strict=True)
        )
        return {
            "us": server / tokens * 1e6 if tokens else float("nan"),
            "tokens": tokens / took,
            "frames": frames / took,
            "bytes": size / tokens if tokens else float("nan"),
            "took": took,
            "server": server / took,
            "system": system / took,
            "upstream": model / took,
            "load": clients / took,
        }


def start_streams(load: Load, clients: list[Client]) -> None:
    """Send all prompts, and wait until no further stream starts."""
    for client in clients:
        client.prompt(f"go #{client.number}")
    load.until(lambda: any(client.first_at for client in clients), "a first token")
    waited, running = 0, 0
    while waited < 4 and running < len(clients):
        load.run(STEP)
        before, running = running, sum(client.first_at > 0 for client in clients)
        waited = 0 if running > before else waited + 1
    load.run(1)  # to warm up


def relay(stand: Stand, streams: int, rate: float, ahead: int = 0) -> Figures:
    """Measure streams of `rate` tokens per second, after the first `ahead` tokens of each reply."""
    stand.upstream.plan(rate=rate, ahead=ahead)
    with stand.load() as load:
        clients = load.connect(streams)
        start_streams(load, clients)
        load.until(lambda: all(c.tokens >= ahead for c in clients), f"{ahead} tokens of each")
        load.latencies = []
        before = [client.tokens for client in clients]
        figures = stand.window(load)
        least = 0.9 * rate * figures["took"]
        full = [c.tokens - b >= least for c, b in zip(clients, before, strict=True)]
        p50, p99 = (quantile(load.latencies, share) * 1e3 for share in (0.5, 0.99))
        return {**figures, "full": sum(full), "p50": p50, "p99": p99}


def throughput(stand: Stand) -> Figures:
    """Measure 50 streams of a model that writes as fast as the server reads.

    Replies have 10,000 tokens, because the libraries of some peers slow down in longer replies. The
    next reply uses a new connection, because a conversation would send its history again.
    """
    stand.upstream.plan(tokens=10_000)
    with stand.load() as load:

        def again(client: Client) -> None:
            load.close([client])
            load.open(prompt=f"go #{load.serial + 1}")

        load.on_over = again
        for _ in range(50):
            load.open(prompt=f"go #{load.serial + 1}")
        load.until(lambda: load.tokens > 0, "a first token")
        load.run(1)
        return stand.window(load)


def first(stand: Stand) -> Figures:
    """Measure the first token of 100 prompts at once: one burst to warm up, then five."""
    stand.upstream.plan(tokens=10, rate=50)
    firsts: list[float] = []
    bursts, used = 6, 0.0
    with stand.load() as load:
        clients = load.connect(100)
        for burst in range(bursts):
            if burst == 1:
                used = stand.server.cpu()
            for client in clients:
                client.prompt(f"go #{client.number}")
            load.until(lambda: not any(client.running for client in clients), "ends of replies")
            load.run(0.1)
            if burst:
                firsts += [client.first_at - client.asked_at for client in clients]
        used = stand.server.cpu() - used
    return {
        "p50": quantile(firsts, 0.5) * 1e3,
        "p99": quantile(firsts, 0.99) * 1e3,
        "cpu": used / (len(clients) * (bursts - 1)) * 1e3,
    }


def stop(stand: Stand) -> Figures:
    """Measure the stop of 200 running streams, one after the other."""
    stand.upstream.plan(rate=20)
    with stand.load() as load:
        clients = load.connect(200)
        start_streams(load, clients)
        for client in clients:
            client.stop()
            load.run(0.01)
        load.until(lambda: not any(client.running for client in clients), "ends of stopped replies")
        load.run(STEP)
        closes = stand.upstream.stats()["closes"]
        took = [closes[str(c.number)] - c.stopped_at for c in clients if str(c.number) in closes]
        if len(took) < len(clients):
            raise Failure(f"only {len(took)} of {len(clients)} stops reached the upstream")
    return {"p50": quantile(took, 0.5) * 1e3, "p99": quantile(took, 0.99) * 1e3}


def memory(stand: Stand) -> Figures:
    """Measure the memory of 2,000 more idle connections, and of 200 more streams."""
    stand.upstream.plan(rate=2)

    def growth(load: Load, few: int, many: int, begin: Callable[[list[Client]], object]) -> float:
        """Return the KiB of each of `many` connections that are opened after `few`."""
        begin(load.connect(few))
        load.run(1.5)
        before = stand.server.memory()
        begin(load.connect(many))
        load.run(2)
        return (stand.server.memory() - before) / many / 1024

    with stand.load() as load:
        idle = growth(load, 200, 2000, lambda clients: None) if load.idles else float("nan")
        running = growth(load, 50, 200, lambda clients: start_streams(load, clients))
        return {"idle": idle, "running": running}


Case = Callable[[Stand], Figures]
CASES: dict[str, Case] = {
    "cpu100": lambda stand: relay(stand, 100, 50),
    "cpu500": lambda stand: relay(stand, 500, 30),
    "throughput": throughput,
    "first": first,
    "stop": stop,
    "memory": memory,
    "start": lambda stand: {},  # main() measures the start of every process
}
# These cases count tokens and measure no times. So one round is enough, and the load generator is
# not needed: servers without WebSocket take part.
PROMISES: dict[str, Case] = {
    "after_stop": lambda stand: after_stop(stand.running, stand.upstream),
    "resumed": lambda stand: resumed(stand.running, stand.upstream),
}
# All cases have the same tokens per second, because an idle server spends more CPU per wake-up.
GROWTH: dict[str, Case] = {
    "10 streams": lambda stand: relay(stand, 10, 500),
    "100 streams": lambda stand: relay(stand, 100, 50),
    "1,000 streams": lambda stand: relay(stand, 1000, 5),
    "after 100 tokens": lambda stand: relay(stand, 20, 250, ahead=100),
    "after 100,000 tokens": lambda stand: relay(stand, 20, 250, ahead=100_000),
}
# What a transport costs: these cases with each of `TRANSPORTS`.
COSTS = ("cpu100", "first", "stop", "memory")
ALL = (*CASES, *PROMISES, "growth", "transports")
QUICK = ("cpu100", "throughput", "first", "stop", "memory", "start")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Compare this server with others. No other program should run meanwhile.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round with Bun only, in about a minute"
    )
    parser.add_argument("--only", metavar="CASES", help=f"some of {','.join(ALL)}; default: all")
    parser.add_argument(
        "--promises", action="store_true", help=f"the same as --only {','.join(PROMISES)}"
    )
    parser.add_argument(
        "--servers",
        metavar="NAMES",
        help=f"some of {','.join(SERVERS)}; default: all that are installed",
    )
    parser.add_argument(
        "--rounds", type=int, help="number of rounds; default: 3, or 1 with --quick"
    )
    parser.add_argument(
        "--seconds", type=float, help="to measure running streams; default: 3, or 2"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write the results of all cases, or of the transports, to {RESULTS.name}, and a "
        f"short table of all cases to {README.name}",
    )
    chosen = parser.parse_args()
    cases = QUICK if chosen.quick else tuple(PROMISES) if chosen.promises else ALL
    servers = ("wsserver", DEMO, "bun") if chosen.quick else tuple(SERVERS)
    chosen.cases = chosen.only.split(",") if chosen.only else cases
    chosen.names = chosen.servers.split(",") if chosen.servers else servers
    for name in set(chosen.cases) - {*ALL} | set(chosen.names) - {*SERVERS}:
        parser.error(f"there is no {name!r}")
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 3)
    chosen.seconds = chosen.seconds or (2.0 if chosen.quick else 3.0)
    return chosen


def turns(case: str, names: list[str]) -> list[tuple[str, str, Case]]:
    """Return the parts of a case in one round: the case, the server, and how to measure."""
    if case == "growth":
        return [(name, "wsserver", run) for name, run in GROWTH.items()]
    if case == "transports":
        return [(cost, name, CASES[cost]) for cost in COSTS for name in TRANSPORTS]
    some = [name for name in names if name != DEMO]
    if case in PROMISES:
        some = [name for name in some if case != "resumed" or SERVERS[name].resumes]
        return [(case, name, PROMISES[case]) for name in some]
    # The server with the demo model has no upstream; only its start is measured. The start of the
    # other servers is measured in every case.
    some = [n for n in names if n == DEMO] if case == "start" else some
    return [(case, n, CASES[case]) for n in some if not SERVERS[n].http]


def main() -> int:
    chosen = options()
    raise_limit()
    names = [name for name in chosen.names if SERVERS[name].ready()]
    for name in sorted({*chosen.names} - {*names}):
        print(f"{name} is not installed and is left out: see the Makefile", file=sys.stderr)
    if INSTALLED.exists():
        for path in PEERS.iterdir():
            shutil.copy(path, INSTALLED)
    once = [turn for case in chosen.cases if case in PROMISES for turn in turns(case, names)]
    often = [turn for case in chosen.cases if case not in PROMISES for turn in turns(case, names)]
    if chosen.cases == ["start"]:  # the start of other servers is measured in every case
        often = [("start", name, CASES["start"]) for name in names]
    results = Results()
    with upstream() as model:
        plan = [*once, *often * chosen.rounds]
        for number, (case, name, run) in enumerate(plan, 1):
            print(f"{number}/{len(plan)} {case}, {name}", file=sys.stderr)
            try:
                with serve({**SERVERS, **TRANSPORTS}[name], model.url) as running:
                    results.add("start", name, {"start": running.started})
                    stand = Stand(running, model, chosen.seconds)
                    results.add(case, name, run(stand) | {"others": stand.others()})
            except (Failure, OSError, ExceptionGroup) as failure:
                model.program.check()
                results.failed(case, name, str(failure))
                print(f"{case}, {name}: {failure}\n", file=sys.stderr)
    text = table(results, [name for name in names if name != DEMO])
    print(text)
    if chosen.write:
        if not {*CASES, *PROMISES} - {*chosen.cases}:
            write(text, chosen.rounds)
            between_marks(README, short_table(results, [name for name in names if name != DEMO]))
        if "transports" in chosen.cases:
            write(transports_table(results), chosen.rounds, "transports")
    return bool(results.failures)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        sys.exit(130)
