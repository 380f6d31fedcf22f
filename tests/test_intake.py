"""Intake of model output into the log, for iterated models and push models."""

import contextlib
from collections.abc import AsyncIterator

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet, Reply, Thinking
from wsserver import Code, End, ModelError, Request, Usage
from wsserver.encoding import encode_run
from wsserver.models.base import Take
from wsserver.pieces import Run


class Pusher:
    """The same model as a PushModel."""

    name = "pusher"

    def __init__(self, puppet: Puppet) -> None:
        self._puppet = puppet

    async def push(self, request: Request, take: Take, /) -> None:
        async with contextlib.aclosing(self._puppet(request)) as pieces:
            async for piece in pieces:
                take(piece)


@pytest.fixture(params=["iterated", "pushing"])
async def server(request: pytest.FixtureRequest, puppet: Puppet) -> AsyncIterator[wsserver.Server]:
    model = puppet if request.param == "iterated" else Pusher(puppet)
    async with wsserver.serve(
        model, port=0, drain_timeout=0, reply_size=1000, frame_size=256
    ) as running:
        yield running


async def asked(chat: Client, puppet: Puppet) -> tuple[str, Reply]:
    start = await chat.prompt()
    return start["id"], await puppet.reply(len(puppet.replies) - 1)


async def test_text_thinking_usage_and_end_arrive(chat: Client, puppet: Puppet) -> None:
    generation, reply = await asked(chat, puppet)
    reply.say(Thinking("hm"), "Hello ", "", "you", Usage(3, 2), End("stop_sequence")).end()
    text, done = await chat.text(generation)
    assert (text, chat.said(generation, "thinking")) == ("Hello you", "hm")
    assert (done["reason"], done["seq"]) == ("stop_sequence", 3)


async def test_model_without_end_counts_as_end_turn(chat: Client, puppet: Puppet) -> None:
    generation, reply = await asked(chat, puppet)
    reply.say("Hello").end()
    text, done = await chat.text(generation)
    assert (text, done["reason"]) == ("Hello", "end_turn")


async def test_stop_closes_model_and_drops_later_pieces(chat: Client, puppet: Puppet) -> None:
    generation, reply = await asked(chat, puppet)
    reply.stubborn = True
    reply.say("before")
    await chat.next("token")
    await chat.send({"type": "stop"})
    text, done = await chat.text(generation)
    assert (text, done["by"]) == ("before", "client")
    assert reply.closed.is_set()


async def test_model_error_reaches_client(chat: Client, puppet: Puppet) -> None:
    generation, reply = await asked(chat, puppet)
    reply.say("half").fail(ModelError(Code.OVERLOADED, retry_after=2))
    text, error = await chat.text(generation)
    assert (text, error["code"], error["retry_after"]) == ("half", "overloaded", 2)


async def test_invalid_piece_of_model_is_internal_error(chat: Client, puppet: Puppet) -> None:
    generation, reply = await asked(chat, puppet)
    reply.say("half", 5)  # type: ignore[arg-type]
    text, error = await chat.text(generation)
    assert (text, error["code"]) == ("half", "internal")
    assert reply.closed.is_set()


async def test_reply_ends_at_reply_size(chat: Client, puppet: Puppet) -> None:
    generation, reply = await asked(chat, puppet)
    reply.say("a" * 990, "b" * 500, "never heard")
    text, done = await chat.text(generation)
    assert text == "a" * 990 + "b" * 10
    assert done["reason"] == "max_tokens"
    assert max(len(frame["text"]) for frame in chat.frames if frame["type"] == "token") <= 512
    assert reply.closed.is_set()


@pytest.mark.parametrize(
    ("pieces", "text", "thinking"),
    [
        (["a\ud83d", "\ude00b"], "a😀b", ""),
        (["\ud83d", "", "\ude00"], "😀", ""),
        (["\ud83d", Usage(1, 1), "\ude00"], "😀", ""),
        (["a\ud83d", "\ud83d", "\ude00"], "a\ufffd😀", ""),
        (["a\ud83d", "b"], "a\ufffdb", ""),
        (["a", "\ude00b"], "a\ufffdb", ""),
        (["a\ud83d"], "a\ufffd", ""),
        ([Thinking("a\ud83d"), Thinking("\ude00b")], "", "a😀b"),
        ([Thinking("a\ud83d"), "\ude00b"], "\ufffdb", "a\ufffd"),
        ([Thinking("a\ud83d"), "", Thinking("\ude00b")], "", "a😀b"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("fails", [False, True])
async def test_high_surrogate_waits_for_low_surrogate(
    chat: Client,
    puppet: Puppet,
    pieces: list[str | Usage],
    text: str,
    thinking: str,
    fails: bool,
) -> None:
    generation, reply = await asked(chat, puppet)
    reply.say(*pieces)
    if fails:
        reply.fail(ModelError(Code.OVERLOADED))
    else:
        reply.end()
    said, _ = await chat.text(generation)
    assert (said, chat.said(generation, "thinking")) == (text, thinking)


async def test_followers_at_same_cursor_share_one_frame(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(generation: str, run: Run) -> bytes:
        made.append(run.seq)
        return encode_run(generation, run)

    monkeypatch.setattr("wsserver.dialects.v1.encode_run", counted)
    async with client(server) as one, client(server) as two, client(server) as three:
        generation, reply = await asked(one, puppet)
        for other in (two, three):
            await other.send({"type": "resume", "id": generation})
            await other.next("start")
        for number in range(20):
            reply.say(f"{number} ")
            await one.next("token", seq=number + 1)
        reply.end()
        said = [(await chat.text(generation))[0] for chat in (one, two, three)]
    assert said == 3 * ["".join(f"{number} " for number in range(20))]
    assert made == list(range(1, 21)), "each frame is encoded once"
