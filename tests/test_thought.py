"""The time that a model thought, in the terminal and in the history."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.clock import ClockLoop
from tests.test_app import connect, running
from wsserver import Code, ModelError, Request, Thinking
from wsserver.models.base import Output

CONVERSATION = "of-a-thoughtful-model"
WORK: dict[str, list[Output | float | Exception]] = {  # pieces, and seconds between them
    "one block": [Thinking("hm"), 3.0, Thinking("ha"), 2.0, "Yes."],
    "two blocks": [Thinking("a", "s"), 1.0, "So", 4.0, Thinking("b"), 2.0, " be it."],
    "no thinking": [4.0, "Yes."],
    "only thinking": ["So", 1.0, Thinking("hm"), 2.5],
    "failure": [Thinking("hm"), 6.0, ModelError(Code.OVERLOADED)],
}


async def think(request: Request) -> AsyncIterator[Output]:
    for step in WORK[request.prompt]:
        if isinstance(step, float):
            await asyncio.sleep(step)
        elif isinstance(step, Exception):
            raise step
        else:
            yield step


@pytest.mark.parametrize(
    ("prompt", "thought"),
    [
        ("one block", 5),
        ("two blocks", 3),
        ("no thinking", None),
        ("only thinking", 2.5),
        ("failure", 6),
    ],
)
def test_terminal_and_history_have_seconds_of_thinking(prompt: str, thought: float | None) -> None:
    async def converse() -> tuple[dict[str, Any], dict[str, Any]]:
        async with running(think) as app:
            connection, line, visitor = await connect(app)
            connection.receive(json.dumps({"prompt": prompt, "conversation": CONVERSATION}))
            terminal = await line.next("error" if prompt == "failure" else "done")
            connection.receive(json.dumps({"type": "open", "conversation": CONVERSATION}))
            history = await line.next("history")
            app.closed(line, visitor)
            return terminal, history["messages"][-1]

    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        terminal, reply = runner.run(converse())
    expected = None if thought is None else pytest.approx(thought, abs=0.1)
    assert terminal.get("thought") == reply.get("thought") == expected


def test_stopped_reply_thought_until_the_stop() -> None:
    async def stop() -> dict[str, Any]:
        async def forever(_: Request) -> AsyncIterator[Output]:
            yield Thinking("hm")
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(2)  # the model closes its request late

        async with running(forever) as app:
            connection, line, visitor = await connect(app)
            connection.receive('{"prompt": "Hi"}')
            await line.next("thinking")
            await asyncio.sleep(5)
            connection.receive('{"type": "stop"}')
            done = await line.next("done")
            app.closed(line, visitor)
            return done

    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        done = runner.run(stop())
    assert done["thought"] == pytest.approx(5, abs=0.1)
