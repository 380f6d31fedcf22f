"""The hub without sockets: failing followers, slow stores, limits, and the end of the process."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.puppet import BOUND, until
from tests.support.stand import ACCOUNT, ONE, OWNER, TWO, Bystander, Stand
from wsserver import Code
from wsserver.content import Message
from wsserver.errors import Refused, StoreError
from wsserver.generation import State
from wsserver.hub.context import messages_of
from wsserver.hub.live import Conversation, Generation
from wsserver.protocol import Prompt

ID = "0123456789abcdef"


class Broken:
    """A follower that fails when the log has its terminal, or at once."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation

    def wake(self) -> None:
        if self.generation.log.terminal is not None:
            raise ZeroDivisionError("secret")


class Listener:
    """A follower that counts."""

    def __init__(self) -> None:
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    yield stand
    await stand.hub.close(BOUND)


async def test_failing_follower_does_not_keep_generation(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    generation = await stand.prompt()
    waiting = await stand.prompt("And then?", on_busy="queue")
    listener = Listener()
    stand.hub.follow(generation, Broken(generation))
    stand.hub.follow(generation, listener)
    (await stand.puppet.reply()).end()
    await stand.ended(generation)
    assert listener.woken == 1
    (await stand.puppet.reply(1)).end()
    await stand.ended(waiting)
    assert stand.hub.live == len(stand.hub.accounts) == 0
    assert stand.memory.used == stand.memory.cached
    assert "follower failed" in caplog.text
    assert "secret" not in caplog.text


async def test_queued_prompt_with_failing_request_ends_and_next_runs(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations = [await stand.prompt(text, on_busy="queue") for text in ("x", "0", "1")]

    def broken(turns: Any, prompt: Message, **sizes: int) -> Any:
        if prompt.text == "0":
            raise ZeroDivisionError("secret")
        return messages_of(turns, prompt, **sizes)

    monkeypatch.setattr("wsserver.hub.running.messages_of", broken)
    (await stand.puppet.reply()).end()
    (await stand.puppet.reply(1)).end()
    for generation in generations:
        await stand.ended(generation)
    codes = [getattr(generation.log.terminal, "code", None) for generation in generations]
    assert codes == [None, Code.INTERNAL, None]
    assert stand.hub.live == len(stand.hub.accounts) == 0


async def test_delete_of_one_owner_does_not_repeat_find_of_other(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = await stand.prompt()
    (await stand.puppet.reply()).end()
    await stand.ended(generation)
    finds = 0
    find = stand.store.find

    async def counted(*given: Any) -> Any:
        nonlocal finds
        finds += 1
        await stand.hub.delete(OWNER, ONE)
        return await find(*given)

    monkeypatch.setattr(stand.store, "find", counted)
    assert await stand.hub.retention.find("bob", "0123456789abcdef", ("principal bob",)) is None
    assert finds == 1


async def test_find_during_delete_returns_forgotten(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = await stand.prompt(id="0123456789abcdef")
    (await stand.puppet.reply()).say("x").end()
    await stand.ended(generation)
    stand.hub.retention.forget(generation)
    find, deletes = stand.store.find, 0

    async def late(*given: Any) -> Any:
        nonlocal deletes
        found = await find(*given)
        if not deletes:
            deletes = 1
            await stand.hub.delete(OWNER, ONE)
        return found

    monkeypatch.setattr(stand.store, "find", late)
    with pytest.raises(Refused) as refused:
        await stand.hub.retention.find(OWNER, generation.id, ACCOUNT)
    assert refused.value.code == Code.FORGOTTEN


async def test_delete_forgets_only_ended_replies_of_conversation(stand: Stand) -> None:
    kept = [await stand.prompt(conversation=name) for name in (ONE, TWO)]
    for number in range(2):
        (await stand.puppet.reply(number)).end()
    for generation in kept:
        await stand.ended(generation)
    await stand.hub.delete(OWNER, ONE)
    assert list(stand.hub.retention) == kept[1:]
    assert stand.hub.retention.size == kept[1].size


async def test_reply_ending_after_delete_is_not_found() -> None:
    stand = Stand(stop_timeout=0.01)
    generation = await stand.prompt(id="0123456789abcdef")
    reply = await stand.puppet.reply()
    reply.hold = asyncio.Event()
    reply.say("deleted")
    await until(lambda: generation.log.seq)
    await stand.hub.delete(OWNER, ONE)
    await stand.ended(generation)
    assert list(stand.hub.retention) == []
    with pytest.raises(Refused) as refused:
        await stand.hub.retention.find(OWNER, generation.id, ACCOUNT)
    assert refused.value.code == Code.FORGOTTEN
    reply.hold.set()
    await stand.hub.close(BOUND)


async def test_prompt_over_limit_reads_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(prompts_per_minute=1)
    await stand.prompt()
    loads: list[str] = []

    async def load(conversation: str, *_: Any, **__: Any) -> None:
        loads.append(conversation)

    monkeypatch.setattr(stand.store, "load", load)
    with pytest.raises(Refused) as refused:
        await stand.prompt(conversation=TWO)
    assert refused.value.code == Code.LIMIT
    assert loads == []
    await stand.hub.close(BOUND)


async def test_prompt_messages_count_for_memory_while_reply_runs(stand: Stand) -> None:
    messages = [{"role": "user", "content": "x" * 20}] * 1000
    prompt = Prompt.model_validate({"messages": messages})
    before = stand.memory.used
    generation = await stand.hub.scheduler.accept(prompt, OWNER, ACCOUNT, None, Bystander())
    assert stand.memory.used - before > 1000 * 500
    (await stand.puppet.reply()).end()
    await stand.ended(generation)
    assert stand.memory.used == stand.memory.cached


async def test_prompt_without_memory_is_refused_and_changes_nothing(stand: Stand) -> None:
    stand.memory.limit = 1000
    with pytest.raises(Refused) as refused:
        await stand.prompt("x" * 1000)
    assert refused.value.code == Code.LIMIT
    assert stand.hub.live == len(stand.hub.accounts) == stand.memory.used == 0


async def test_repeated_prompt_runs_once_while_store_fails() -> None:
    stand = Stand(replay_size=1)  # ended replies are not kept in memory
    stand.fail(StoreError("disk"))
    generation = await stand.prompt(id=ID)
    (await stand.puppet.reply()).say("paid").end()
    await stand.ended(generation)
    assert list(stand.hub.retention) == []
    again = await stand.prompt(id=ID)
    assert again.log.text == "paid"
    assert again.log.terminal is not None
    assert again.log.terminal.saved is False
    assert len(stand.puppet.replies) == 1
    stand.fail(None)
    await stand.hub.close(BOUND)
    assert await stand.terminal(ID) is not None


async def test_conversation_with_unsaved_reply_is_not_deleted(stand: Stand) -> None:
    stand.fail(StoreError("disk"))
    generation = await stand.prompt(id=ID)
    with pytest.raises(StoreError):
        await stand.hub.delete(OWNER, ONE)
    await stand.ended(generation)
    stand.fail(None)
    await stand.hub.delete(OWNER, ONE)
    with pytest.raises(Refused) as refused:
        await stand.prompt(id=ID)
    assert refused.value.code == Code.FORGOTTEN


async def test_late_saved_reply_is_in_history_of_next_prompt() -> None:
    stand = Stand(conversations=1)
    stand.fail(StoreError("disk"))
    generation = await stand.prompt()
    (await stand.puppet.reply()).say("late").end()
    await stand.ended(generation)
    other = await stand.prompt(conversation=TWO)  # this conversation takes the only place in memory
    (await stand.puppet.reply(1)).end()
    await stand.ended(other)
    with pytest.raises(StoreError):
        await stand.prompt("And then?")
    stand.fail(None)
    await stand.prompt("And then?")
    reply = await stand.puppet.reply(2)
    assert [m.content for m in reply.request.messages] == ["Hello?", "late", "And then?"]
    await stand.hub.close(BOUND)


async def test_prompt_does_not_scan_conversations_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand = Stand(conversations=1)
    for number in range(200):
        client, port = stand.client()
        name = f"conversation-{number:04}"
        client.receive(json.dumps({"prompt": "x", "conversation": name}))
        (await stand.puppet.reply(number)).end()
        await port.next("done")
        client.receive(json.dumps({"type": "open", "conversation": name}))
        await port.next("history")
    looks = 0
    idle = Conversation.idle.fget  # type: ignore[attr-defined]

    def counted(conversation: Conversation) -> Any:
        nonlocal looks
        looks += 1
        return idle(conversation)

    monkeypatch.setattr(Conversation, "idle", property(counted))
    generation = await stand.prompt(conversation=TWO)
    assert looks < 40
    (await stand.puppet.reply(200)).end()
    await stand.ended(generation)
    await stand.hub.close(BOUND)


async def test_close_saves_terminal_while_model_hangs() -> None:
    stand = Stand()
    generation = await stand.prompt()
    reply = await stand.puppet.reply()
    reply.hold = asyncio.Event()
    reply.say("half")
    await until(lambda: generation.log.seq)
    await stand.hub.close(0.01)
    assert await stand.terminal(generation.id) is not None
    reply.hold.set()
    await until(reply.closed.is_set)


async def test_prompt_is_accepted_while_previous_end_is_saved(stand: Stand) -> None:
    first = await stand.prompt()
    stand.store.turns = 50
    (await stand.puppet.reply()).end()
    await until(lambda: first.state is State.SAVING)
    second = await stand.prompt("And then?")
    assert second.state is State.QUEUED
    (await stand.puppet.reply(1)).end()
    await stand.ended(second)
    assert [m.content for m in stand.puppet.replies[1].request.messages] == ["Hello?", "And then?"]
