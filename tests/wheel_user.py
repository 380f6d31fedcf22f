"""A program of a user of the wheel. Type checkers check it, and it prints what it sees as JSON."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import wsserver
from wsserver.client import Chat, Conversation, Done, History, Reply, ReplyError, connect
from wsserver.client import connect_sync as connect_without_loop
from wsserver.content import Message, Text


async def model(request: wsserver.Request) -> AsyncIterator[str | wsserver.Thinking | wsserver.End]:
    yield wsserver.Thinking("Hm. ")
    if request.prompt == "Fail":
        raise wsserver.ModelError(wsserver.Code.OVERLOADED)
    yield f"{request.messages[-1].role} says "
    yield request.prompt
    if request.prompt == "Wait":
        await asyncio.Event().wait()
    yield wsserver.End("end_turn")


async def talk(chat: Chat) -> dict[str, object]:
    reply: Reply = chat.prompt("Hello")
    text = "".join([part async for part in reply])
    done: Done = await reply.done()
    endless = chat.prompt([Text("Wait")])
    async for _ in endless:
        await endless.stop()
    stopped: str | None = (await endless.done()).by
    try:
        await chat.prompt("Fail").done()
    except ReplyError as error:
        code: str = error.code
    history: History = await chat.history()
    messages: list[Message] = list(history.messages)
    conversations: list[Conversation] = await chat.conversations()
    return {
        "text": text,
        "thinking": reply.thoughts,
        "reason": done.reason,
        "stopped": stopped,
        "code": code,
        "roles": [message.role for message in messages],
        "conversations": len(conversations),
    }


def talk_without_loop(url: str) -> str:
    with connect_without_loop(url) as chat:
        parts: list[str] = list(chat.prompt("Hello"))
    return "".join(parts)


async def main() -> None:
    server: wsserver.Server
    async with wsserver.serve(model, port=0, drain_timeout=0) as server:
        async with connect(server.url) as chat:
            seen = await talk(chat)
        seen["without a loop"] = await asyncio.to_thread(talk_without_loop, server.url)
    seen["version"] = wsserver.__version__
    seen["folder"] = str(Path(wsserver.__file__).parent)
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
