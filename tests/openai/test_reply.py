"""Replies of Chat Completions: text, reasoning, tools, usage and reasons."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

import wsserver
from tests.support.claude import goes_on
from tests.support.client import Client, client
from tests.support.completions import DONE, LAST, chunk, completion, data, delta, usage
from tests.support.upstream import Gate, Upstream, stream
from wsserver.content import Thinking, ToolUse
from wsserver.errors import ModelError
from wsserver.models.openai.reply import ChatReply

TEXT = 'A reply with "quotes", a \\ and\na line end, 世界, 🚀 and «é». '


@pytest.mark.parametrize("chop", [0, 1, 7])
@pytest.mark.parametrize("crlf", [False, True])
async def test_text_arrives_whole(chat: Client, upstream: Upstream, chop: int, crlf: bool) -> None:
    upstream.play(completion(TEXT * 3, chop=chop, crlf=crlf))
    start = await chat.prompt()
    text, done = await chat.text(start["id"])
    assert (text, done["reason"]) == (TEXT * 3, "end_turn")
    assert done["usage"] == {"input_tokens": 25, "output_tokens": 3}
    assert start["model"] == "a-model"


async def test_fake_is_what_the_sdk_of_openai_reads(upstream: Upstream) -> None:
    upstream.play(completion(TEXT, reasoning="hm"))
    async with openai.AsyncOpenAI(api_key="key", base_url=f"{upstream.url}/v1") as sdk:
        chunks = await sdk.chat.completions.create(
            model="a-model",
            messages=[{"role": "user", "content": "Hello?"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        found = [item async for item in chunks]
    said = [item.choices[0].delta.content or "" for item in found if item.choices]
    assert "".join(said) == TEXT
    assert found[-1].usage is not None
    assert found[-1].usage.prompt_tokens == 25


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_thinking(chat: Client, upstream: Upstream, name: str) -> None:
    parts = [delta(**{"content": None, name: text}) for text in ("It ", "is ", "a dot.")]
    upstream.play(completion(*parts, "A dot."))
    start = await chat.prompt()
    text, _ = await chat.text(start["id"])
    thought = "".join(frame["text"] for frame in chat.frames if frame["type"] == "thinking")
    assert (thought, text) == ("It is a dot.", "A dot.")


async def test_both_names_of_reasoning_are_one_text(chat: Client, upstream: Upstream) -> None:
    upstream.play(completion(delta(reasoning="hm", reasoning_content="hm"), "Yes"))
    await chat.text((await chat.prompt())["id"])
    assert [f["text"] for f in chat.frames if f["type"] == "thinking"] == ["hm"]


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("stop", "end_turn"),
        ("eos_token", "end_turn"),
        ("length", "max_tokens"),
        ("model_length", "max_tokens"),
        ("tool_calls", "tool_use"),
        ("a_reason_of_tomorrow", "a_reason_of_tomorrow"),
    ],
)
async def test_reason_is_told_in_words_of_the_protocol(
    chat: Client, upstream: Upstream, reason: str, shown: str
) -> None:
    upstream.play(completion("Yes", reason=reason))
    _, done = await chat.text((await chat.prompt())["id"])
    assert done["reason"] == shown


@pytest.mark.parametrize("reason", ["abort", "insufficient_system_resource"])
async def test_reply_that_the_server_gave_up_is_incomplete(
    chat: Client, upstream: Upstream, reason: str
) -> None:
    upstream.play(completion("Half an", reason=reason))
    text, failed = await chat.text((await chat.prompt())["id"])
    assert (text, failed["code"]) == ("Half an", "incomplete")


@pytest.mark.parametrize(
    ("pieces", "thinking", "text"),
    [
        (["<think>", "\n", "Okay", ", hm", "\n", "</think>", "\n\n", "Yes"], "Okay, hm\n", "Yes"),
        (["\n<thi", "nk>Hm</th", "e</thi", "nk>Yes"], "Hm</the", "Yes"),
        (["<think>Hm</think>Yes"], "Hm", "Yes"),
        (["<think>\n\n</think>\n\nYes"], "", "Yes"),
        (["<think>Hm", "m</thi"], "Hmm</thi", ""),
        (["<thi"], "", "<thi"),
        ([" <", "b> "], "", " <b> "),
        (["Tags: ", "<think>x</think>"], "", "Tags: <think>x</think>"),
        (["<think>a</think>b", "<think>c</think>"], "a", "b<think>c</think>"),
        ([" " * 1000, "<think>"], "", " " * 1000 + "<think>"),
        ([" " * 1000 + "<think>"], "", " " * 1000 + "<think>"),
    ],
)
def test_thinking_in_tags_at_the_beginning_is_thinking(
    pieces: list[str], thinking: str, text: str
) -> None:
    whole = b"".join(delta(content=piece) for piece in pieces) + LAST
    for size in (1, len(whole)):
        found: list[object] = []
        reply = ChatReply(found.append, 100, None)
        for start in range(0, len(whole), size):
            reply.feed(whole[start : start + size])
        reply.finish()
        assert "".join(part.thinking for part in found if isinstance(part, Thinking)) == thinking
        assert "".join(part for part in found if isinstance(part, str)) == text


def test_text_beside_the_end_comes_before_the_call_of_a_tool() -> None:
    call = {"index": 0, "id": "a", "function": {"name": "now", "arguments": "{}"}}
    found: list[object] = []
    reply = ChatReply(found.append, 100, None)
    reply.feed(delta("tool_calls", content="Let me see.", tool_calls=[call]) + DONE)
    assert found == ["Let me see.", ToolUse("a", "now", {})]


async def test_filtered_reply_is_refusal_and_keeps_text(chat: Client, upstream: Upstream) -> None:
    upstream.play(completion("How to", reason="content_filter"))
    text, failed = await chat.text((await chat.prompt())["id"])
    assert (text, failed["code"]) == ("How to", "refusal")


async def test_words_of_a_refusal_are_text(chat: Client, upstream: Upstream) -> None:
    upstream.play(completion(delta(content=None, refusal="I cannot.")))
    assert (await chat.text((await chat.prompt())["id"]))[0] == "I cannot."


async def test_cached_and_reasoning_tokens_count_once(chat: Client, upstream: Upstream) -> None:
    details = {
        "prompt_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 90},
        "completion_tokens": 50,
        "completion_tokens_details": {"reasoning_tokens": 40},
    }
    upstream.play(completion("Yes", counts=details))
    _, done = await chat.text((await chat.prompt())["id"])
    assert done["usage"] == {
        "input_tokens": 10,
        "output_tokens": 50,
        "cache_read_input_tokens": 90,
    }


@pytest.mark.parametrize(
    "script",
    [
        stream(delta(content="Yes"), LAST, DONE),
        stream(delta(content="Yes"), LAST),
        stream(delta("stop", content="Yes"), DONE),
        stream(b": PROCESSING\n\n", delta(content="Yes"), LAST, chunk(), DONE),
        stream(data({"choices": [{"delta": {"content": "Yes"}, "finish_reason": "stop"}]}), DONE),
        stream(delta("", content="Yes"), LAST, delta(""), LAST, DONE),
        stream(delta(content=[{"type": "text", "text": "Yes"}]), LAST, DONE),
        stream(delta(content="Yes"), LAST, b"data: [DONE] \n\n"),
        stream(b":\n\nevent: ping\ndata: {}\n\n", delta(content="Yes"), LAST, b"data: [DONE]\n"),
    ],
    ids=[
        "no usage",
        "no [DONE]",
        "reason beside text",
        "comments",
        "few keys",
        "empty reasons",
        "parts",
        "space after [DONE]",
        "pings",
    ],
)
async def test_other_servers_end_in_other_ways(
    chat: Client, upstream: Upstream, script: Any
) -> None:
    upstream.play(script)
    text, done = await chat.text((await chat.prompt())["id"])
    assert (text, done["type"], done["usage"]["estimated"]) == ("Yes", "done", True)
    await goes_on(chat)


async def test_thinking_among_parts_is_thinking(chat: Client, upstream: Upstream) -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    parts = [thought, {"type": "text", "text": "Yes"}, {"type": "reference", "reference_ids": [1]}]
    upstream.play(completion(delta(content=parts), " indeed"))
    text, _ = await chat.text((await chat.prompt())["id"])
    assert [f["text"] for f in chat.frames if f["type"] == "thinking"] == ["Hm."]
    assert text == "Yes indeed"


async def test_usage_in_each_chunk_is_a_total(chat: Client, upstream: Upstream) -> None:
    upstream.play(stream(delta(content="Yes"), usage(completion_tokens=1), LAST, usage(), DONE))
    _, done = await chat.text((await chat.prompt())["id"])
    assert done["usage"] == {"input_tokens": 25, "output_tokens": 3}


async def test_nothing_after_done_belongs_to_the_reply(chat: Client, upstream: Upstream) -> None:
    upstream.play(stream(delta(content="Yes"), LAST, DONE, delta(content=" and more")))
    assert (await chat.text((await chat.prompt())["id"]))[0] == "Yes"


async def test_call_of_a_tool_is_one_block(chat: Client, upstream: Upstream) -> None:
    def call(**keys: object) -> bytes:
        return delta(tool_calls=[{"index": 0, **keys}])

    upstream.play(
        completion(
            "Looking. ",
            call(id="call_1", type="function", function={"name": "look", "arguments": ""}),
            call(function={"arguments": '{"place": "Žd'}),
            call(function={"arguments": 'iar"}'}),
            reason="tool_calls",
        )
    )
    start = await chat.prompt()
    text, done = await chat.text(start["id"])
    (block,) = [frame["partial_json"] for frame in chat.frames if frame["type"] == "block"]
    assert (text, done["reason"]) == ("Looking. ", "tool_use")
    used = {"type": "tool_use", "id": "call_1", "name": "look", "input": {"place": "Ždiar"}}
    assert json.loads(block) == used


def _call(**keys: object) -> bytes:
    return delta(tool_calls=[keys])


@pytest.mark.parametrize(
    "index", [{}, {"index": None}, {"index": 0}], ids=["missing", "null", "zero"]
)
def test_id_separates_calls_of_tools_without_an_index(index: dict[str, object]) -> None:
    found: list[object] = []
    reply = ChatReply(found.append, 100, None)
    for name in ("one", "two"):
        reply.feed(_call(**index, id=name, function={"name": name, "arguments": '{"n": '}))
        reply.feed(_call(**index, id="", function={"arguments": "1}"}))
        reply.feed(_call(**index, id=name, function={"name": "", "arguments": ""}))
    reply.feed(delta("stop") + DONE)
    calls = [(block.id, block.name, block.input) for block in found if isinstance(block, ToolUse)]
    assert calls == [("one", "one", {"n": 1}), ("two", "two", {"n": 1})]
    assert reply.finish().reason == "tool_use"


@pytest.mark.parametrize(
    "call",
    [
        lambda number: {"index": number},
        lambda number: {"id": str(number)},
        lambda number: {"index": number, "function": {"arguments": ""}},
        lambda _: {"index": 0, "function": {"arguments": "x" * 1000}},
        lambda number: {"index": number % 2, "function": {"arguments": "x" * 1000}},
        lambda _: {"index": 0, "id": "x" * 1000, "function": {"name": "x" * 1000}},
    ],
)
def test_calls_of_tools_without_end_are_malformed(call: Callable[[int], object]) -> None:
    reply = ChatReply(lambda _: None, 100, None)
    with pytest.raises(ModelError, match="could not read"):
        for number in range(10_000):
            reply.feed(delta(tool_calls=[call(number)]))


async def test_text_arrives_before_the_reply_ends(chat: Client, upstream: Upstream) -> None:
    upstream.play(completion("first ", Gate("go"), "last"))
    start = await chat.prompt()
    assert (await chat.next("token"))["text"] == "first "
    upstream.gates["go"].set()
    assert (await chat.text(start["id"]))[0] == "first last"


async def test_half_of_a_character_becomes_a_replacement(chat: Client, upstream: Upstream) -> None:
    half = delta(content="@").replace(b"@", rb"\ud83d")
    upstream.play(completion(half, "!"))
    assert (await chat.text((await chat.prompt())["id"]))[0] == "\ufffd!"


async def test_connection_is_used_again(chat: Client, upstream: Upstream) -> None:
    for _ in range(3):
        await chat.text((await chat.prompt())["id"])
    assert len({received.peer for received in upstream.requests}) == 1


async def test_request_has_conversation_key_and_model(
    chat: Client, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chat.text((await chat.prompt("One", system="Be brief.", temperature=0.5))["id"])
    await chat.text((await chat.prompt("Two", max_tokens=9))["id"])
    first, second = upstream.requests
    assert first.headers["authorization"] == "Bearer sk-secret"
    assert first.path == "/v1/chat/completions"
    assert first.body == {
        "model": "a-model",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One"},
        ],
        "max_tokens": 8192,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert second.body["max_tokens"] == 9
    assert second.body["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Hello world"},
        {"role": "user", "content": "Two"},
    ]


async def test_client_chooses_among_allowed_models(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{upstream.url}/v1/")
    async with (
        wsserver.serve(model="openai:a-model", models=["another"], port=0) as server,
        client(server) as chat,
    ):
        await chat.text((await chat.prompt("Hello?", model="another"))["id"])
    (received,) = upstream.requests
    assert json.loads(received.raw)["model"] == "another"
    assert "authorization" not in received.headers
