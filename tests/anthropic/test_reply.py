"""Replies of the API: text, thinking and end, with reads split anywhere."""

import pytest

from tests.support.claude import escaped
from tests.support.client import Client
from tests.support.upstream import (
    UNKNOWN_EVENT,
    Gate,
    Script,
    ToolUse,
    Upstream,
    event,
    reply,
    stream,
)

MODEL = "claude-sonnet-4-6"


async def test_text_and_thinking_reach_client(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply("Hello ", "wide world", thinking="Let me think", output_tokens=9))
    start = await chat.prompt("Hi")
    text, done = await chat.text(start["id"])
    assert start["model"] == MODEL
    assert text == "Hello wide world"
    assert chat.said(start["id"], "thinking") == "Let me think"
    assert done["reason"] == "end_turn"
    assert done["usage"] == {"input_tokens": 25, "output_tokens": 9}


@pytest.mark.parametrize(
    "reason",
    [
        "end_turn",
        "max_tokens",
        "stop_sequence",
        "tool_use",
        "pause_turn",
        "model_context_window_exceeded",
        "a_reason_of_tomorrow",
    ],
)
async def test_stop_reason_reaches_client(chat: Client, upstream: Upstream, reason: str) -> None:
    upstream.play(reply("So", stop_reason=reason))
    await chat.prompt()
    assert (await chat.next("done"))["reason"] == reason


async def test_refusal_is_error_and_keeps_text(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply("Well, ", stop_reason="refusal", output_tokens=3))
    start = await chat.prompt()
    text, refusal = await chat.text(start["id"])
    assert (text, refusal["code"], refusal["retryable"]) == ("Well, ", "refusal", False)
    assert refusal["usage"] == {"input_tokens": 25, "output_tokens": 3}


@pytest.mark.parametrize(
    "script",
    [
        reply("naïve 😀 ", "words", thinking="hm", chop=1),
        reply("naïve 😀 ", "words", thinking="hm", chop=7, crlf=True),
        reply("naïve 😀 ", "words", thinking="hm", crlf=True),
        reply("naïve 😀 ", UNKNOWN_EVENT, b": a comment\n\n", "words", thinking="hm"),
        reply("naïve 😀 ", b"id: 5\nretry: 9\n\n", "words", thinking="hm"),
        reply(["na", "ïve ", "😀 ", "words"], ToolUse("weather", {"in": "Rome"}), thinking="hm"),
    ],
    ids=["byte by byte", "CRLF in bits", "CRLF", "unknown events", "other fields", "a tool"],
)
async def test_stream_is_parsed_when_split_at_any_byte(
    chat: Client, upstream: Upstream, script: Script
) -> None:
    upstream.play(script)
    start = await chat.prompt()
    text, done = await chat.text(start["id"])
    assert (text, done["type"]) == ("naïve 😀 words", "done")
    assert chat.said(start["id"], "thinking") == "hm"


async def test_deltas_of_one_read_are_sent_in_few_frames(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply(["word "] * 5000))
    start = await chat.prompt()
    text, _ = await chat.text(start["id"])
    assert text == "word " * 5000
    tokens = [frame for frame in chat.frames if frame["type"] == "token"]
    assert len(tokens) < 500


async def test_text_after_message_stop_is_ignored(chat: Client, upstream: Upstream) -> None:
    said, late = (
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        for text in ("Hello", " and more")
    )
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1})
    upstream.play(stream(said + end + event("message_stop") + late))  # all of it in one read
    text, done = await chat.text((await chat.prompt())["id"])
    assert (text, done["reason"]) == ("Hello", "end_turn")


async def test_done_is_sent_before_body_ends(chat: Client, upstream: Upstream) -> None:
    whole = reply("whole")
    upstream.play(Script((*whole.steps, Gate("go"))))
    start = await chat.prompt()
    text, done = await chat.text(start["id"])
    assert (text, done["reason"]) == ("whole", "end_turn")
    assert upstream.open == 1, "the body has no end yet"
    upstream.gates["go"].set()
    assert await upstream.requests[0].closed() == "finished"
    await chat.text((await chat.prompt())["id"])
    assert upstream.requests[0].peer == upstream.requests[1].peer


@pytest.mark.parametrize(
    ("deltas", "said"),
    [
        ([r"Hi \ud83d\ude00!"], "Hi 😀!"),
        ([r"Hi \ud83d", r"\ude00!"], "Hi 😀!"),
        ([r"Hi \uD83D", "", r"\uDE00!"], "Hi 😀!"),
        ([r"Hi \ud83d", "!"], "Hi \ufffd!"),
        ([r"Hi \ud83d there"], "Hi \ufffd there"),
        ([r"Hi \ude00"], "Hi \ufffd"),
        ([r"Hi \ud83d"], "Hi \ufffd"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "thinking"])
@pytest.mark.parametrize("chop", [0, 7], ids=["one read", "many reads"])
async def test_split_surrogate_pair_is_joined(
    chat: Client, upstream: Upstream, deltas: list[str], said: str, kind: str, chop: int
) -> None:
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1})
    parts = [escaped(text, kind) for text in deltas]
    upstream.play(stream(*parts, end, event("message_stop"), chop=chop))
    start = await chat.prompt()
    _, done = await chat.text(start["id"])
    assert chat.said(start["id"], "token" if kind == "text" else "thinking") == said
    assert done["reason"] == "end_turn"
