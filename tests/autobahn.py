"""The Autobahn test suite as a client of the WebSocket server, with an echo in place of chats.

::

    python -m tests.autobahn .tools/autobahn/bin/wstest

prints the failed cases, and exits with 1 if an unknown case failed.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.crowd import MANY
from wsserver import Settings
from wsserver.admission import Admission
from wsserver.denials import Denied
from wsserver.limits import Memory
from wsserver.responses import Upgrade
from wsserver.sockets.listener import Listener
from wsserver.sockets.websocket import Socket, frame
from wsserver.telemetry import Metrics

GROUPS = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*"]
CASES = 301  # of these groups
PASSED = {"OK", "NON-STRICT", "INFORMATIONAL"}
KNOWN = {
    "7.1.5": "websockets does not fail a text message that a close frame interrupts",
}
BOUND = 1800.0  # seconds
BINARY = b"\x82"
LARGE = 2**26  # bytes: group 9 has messages of 16 MiB
SETTINGS = {
    "port": 0,
    "message_size": LARGE,
    "max_unsent": 4 * LARGE,
    "memory": 64 * LARGE,
    "frame_rate": MANY,
    "frame_burst": MANY,
    "connections_per_address": MANY,
}


class Echo:
    """Sends each message back."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket

    def receive(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self.socket.write(message.encode())
        else:
            self.socket.transport.write(BINARY + frame(message)[1:])

    def wake(self) -> None:
        pass


def on_denied(denied: Denied, peer: str, headers: Mapping[str, str]) -> None:
    print(f"refused {peer}: {denied}", file=sys.stderr)


async def run_suite(wstest: str, folder: Path) -> dict[str, str]:
    """Run the suite; return the behavior of the server by the number of each case."""
    settings = Settings.load(**SETTINGS)
    metrics = Metrics()

    async def answer(*_: object) -> Upgrade:
        return Upgrade(())

    listener = Listener(
        settings,
        answer,
        Memory(settings.memory),
        admission=Admission(settings, None),
        on_denied=on_denied,
        on_open=lambda socket, _: Echo(socket),
        on_close=lambda *_: None,
        metrics=metrics,
    )
    await listener.bind(("127.0.0.1", 0))
    listener.serve()
    port = listener.bound[0].getsockname()[1]
    server = {"agent": "wsserver", "url": f"ws://127.0.0.1:{port}"}
    spec = {"outdir": str(folder), "servers": [server], "cases": GROUPS, "exclude-cases": []}
    (folder / "spec.json").write_text(json.dumps(spec))
    command = (wstest, "--mode", "fuzzingclient", "--spec", str(folder / "spec.json"))
    process = await asyncio.create_subprocess_exec(*command, cwd=folder)
    try:
        async with asyncio.timeout(BOUND):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        listener.stop_listening()
        listener.abort()
        await listener.wait_closed()
    report = json.loads((folder / "index.json").read_text())["wsserver"]
    return {case: result["behavior"] for case, result in report.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        behaviors = asyncio.run(run_suite(str(Path(sys.argv[1]).absolute()), Path(folder)))
    failed = {case for case, behavior in behaviors.items() if behavior not in PASSED}
    for case in sorted(failed):
        print(f"{case}: {behaviors[case]}; {KNOWN.get(case, 'not known')}")
    print(f"{len(behaviors) - len(failed)} of {len(behaviors)} cases passed")
    sys.exit(bool(failed - KNOWN.keys()) or len(behaviors) != CASES)


if __name__ == "__main__":
    main()
