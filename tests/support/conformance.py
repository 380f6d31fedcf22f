"""Plays the exchanges of ``tests/conformance.json``, as ``tests/conformance.md`` describes them."""

import asyncio
import json
from pathlib import Path
from typing import Any, Protocol

from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet, Reply, until
from wsserver import Code, End, ModelError, Thinking

__all__ = ["EXCHANGES", "Driver", "Seen", "play"]

Step = dict[str, Any]
Seen = dict[str, Any]

EXCHANGES: dict[str, list[Step]] = {
    exchange["name"]: exchange["steps"]
    for exchange in json.loads((Path(__file__).parents[1] / "conformance.json").read_text())[
        "exchanges"
    ]
}


class Driver(Protocol):
    """Drives a client. Conversations have ids; replies have the short names of the exchange."""

    async def prompt(self, reply: str, text: str, conversation: str, on_busy: str) -> None:
        """Send a prompt, without waiting."""
        ...

    async def stop(self, reply: str) -> None:
        """Stop a reply, without waiting."""
        ...

    async def resume(self, reply: str, of: str | None, named: str | None) -> None:
        """Resume a reply from its beginning: that of the name ``of``, or of the id ``named``."""
        ...

    async def seen(self, reply: str) -> Seen:
        """Return the state of a reply in the client.

        ``started``, ``queued``, ``text``, ``thinking``, and the whole ``done`` or ``error``.
        """
        ...

    async def request(self, kind: str, **keys: str) -> Any:
        """Send ``history``, ``conversations``, ``rename`` or ``delete``; return the answer."""
        ...

    async def mended(self) -> None:
        """Reconnect, unless the client reconnects by itself."""
        ...


async def play(steps: list[Step], driver: Driver, puppet: Puppet, line: Line) -> None:
    """Play one exchange."""
    game = _Game(driver, puppet, line)
    for number, step in enumerate(steps):
        try:
            async with asyncio.timeout(BOUND):
                await game.take(step)
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"step {number}, {step}: {error}; seen: {game.shown}") from error


class _Game:
    def __init__(self, driver: Driver, puppet: Puppet, line: Line) -> None:
        self.shown: dict[str, Seen] = {}
        self._driver = driver
        self._puppet = puppet
        self._line = line
        self._prompts: dict[str, str] = {}

    async def take(self, step: Step) -> None:
        if "do" in step:
            await self._do(step)
        elif "model" in step:
            await self._speak(step)
        elif "see" in step:
            await self._see(step)
        elif "line" in step:
            await self._change(step["line"])
        else:
            assert len(self._puppet.replies) == step["asked"]

    async def _do(self, step: Step) -> None:
        kind, reply = step["do"], step.get("reply", "")
        if kind == "prompt":
            self._prompts[reply] = step["prompt"]
            conversation = _conversation(step["conversation"])
            on_busy = step.get("on_busy", "reject")
            await self._driver.prompt(reply, step["prompt"], conversation, on_busy)
        elif kind == "stop":
            await self._driver.stop(reply)
        elif kind == "resume":
            await self._driver.resume(reply, step.get("of"), step.get("id"))
        else:
            keys = {key: step[key] for key in ("conversation", "title") if key in step}
            if "conversation" in keys:
                keys["conversation"] = _conversation(keys["conversation"])
            answer = await self._driver.request(kind, **keys)
            expected = step["see"]
            if kind == "conversations":
                expected = [[_conversation(name), title] for name, title in expected]
            assert answer == expected, answer

    async def _speak(self, step: Step) -> None:
        prompt = self._prompts[step["model"]]
        found: list[Reply] = []

        def asked() -> bool:
            found[:] = [r for r in self._puppet.replies if r.request.prompt == prompt]
            return bool(found)

        await until(asked)
        (reply,) = found
        if "asked" in step:
            assert [m.content for m in reply.request.messages] == step["asked"]
        reply.say(*map(Thinking, step.get("think", ())), *step.get("say", ()))
        if "end" in step:
            reply.say(End(step["end"])).end()
        if "fail" in step:
            fail = step["fail"]
            reply.fail(ModelError(Code[fail["code"].upper()], retry_after=fail.get("retry_after")))
        if step.get("closed"):
            await reply.closed.wait()
        else:
            await until(reply.heard_out)

    async def _see(self, step: Step) -> None:
        reply = step["see"]
        before = self.shown.get(reply, {})
        while True:
            seen = await self._driver.seen(reply)
            for key in ("text", "thinking"):
                assert seen[key].startswith(before.get(key, "")), (before, seen)
            before = self.shown[reply] = seen
            if all(_fits(seen.get(key), value) for key, value in step.items() if key != "see"):
                return
            over = seen.get("done") or seen.get("error")
            assert not over, seen
            await asyncio.sleep(0)

    async def _change(self, how: str) -> None:
        if how == "cut":
            self._line.cut()
        elif how == "deaf":
            self._line.deafen()
        else:
            self._line.mend()
            await self._driver.mended()


def _conversation(name: str) -> str:
    return f"conversation-of-{name}"


def _fits(seen: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return seen is not None and all(seen.get(key) == expected[key] for key in expected)
    return bool(seen == expected)
