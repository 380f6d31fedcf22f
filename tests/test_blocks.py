"""Blocks of a reply on the wire: indexes, frames of each kind, resume at any piece."""

import json
from typing import Any

from tests.support.client import Client, client
from tests.support.puppet import Puppet, Reply
from wsserver import Server, Thinking
from wsserver.content import RedactedThinking, Text, ToolUse
from wsserver.pieces import Piece
from wsserver.settings import ESCAPED

CITATION = {"type": "char_location", "cited_text": "é"}
CALL = ToolUse("t", "add", {"a": ["é", 1]})
CONTENT = ("token", "thinking", "block")


async def frames(chat: Client, puppet: Puppet, *outputs: Any) -> list[dict[str, Any]]:
    """Return the content frames of a reply, without type, id and seq."""
    start = await chat.prompt()
    (await puppet.reply(len(puppet.replies) - 1)).say(*outputs).end()
    await chat.next("done", id=start["id"])
    found = [f for f in chat.frames if f.get("id") == start["id"] and f["type"] in CONTENT]
    return [{k: v for k, v in f.items() if k not in {"id", "seq"}} for f in found]


def merged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge neighbouring frames of one kind and block, as the server may."""
    whole: list[dict[str, Any]] = []
    for frame in found:
        last = whole[-1] if whole else {}
        alike = last.keys() == frame.keys() and last.get("block") == frame.get("block")
        if alike and last["type"] == frame["type"] and "citation" not in frame:
            for key in {"text", "signature", "partial_json"} & frame.keys():
                last[key] += frame[key]
        else:
            whole.append(dict(frame))
    return whole


async def test_change_of_kind_begins_block(chat: Client, puppet: Puppet) -> None:
    found = await frames(chat, puppet, "a", "b", Thinking("c"), "", Thinking("d"), "e")
    assert merged(found) == [
        {"type": "token", "text": "ab"},
        {"type": "thinking", "block": 1, "text": "cd"},
        {"type": "token", "block": 2, "text": "e"},
    ]


async def test_empty_block_has_no_index(chat: Client, puppet: Puppet) -> None:
    outputs = Piece("text", 0, ""), Piece("thinking", 1, ""), Piece("text", 2, ""), "a", "b"
    assert merged(await frames(chat, puppet, *outputs)) == [{"type": "token", "text": "ab"}]


async def test_piece_with_other_block_index_begins_block(chat: Client, puppet: Puppet) -> None:
    outputs = Piece("text", 0, "a"), "b", Piece("text", 3, ""), "c"
    assert merged(await frames(chat, puppet, *outputs)) == [
        {"type": "token", "text": "ab"},
        {"type": "token", "block": 1, "text": "c"},
    ]


async def test_signature_ends_thinking_block(chat: Client, puppet: Puppet) -> None:
    outputs = Thinking("a", "s"), Thinking("b"), Thinking("", "t")
    assert merged(await frames(chat, puppet, *outputs)) == [
        {"type": "thinking", "text": "a"},
        {"type": "thinking", "text": "", "signature": "s"},
        {"type": "thinking", "block": 1, "text": "b"},
        {"type": "thinking", "text": "", "block": 1, "signature": "t"},
    ]


async def test_other_block_is_one_frame(chat: Client, puppet: Puppet) -> None:
    found = await frames(chat, puppet, "a", CALL, RedactedThinking("x"), "b")
    assert [frame["type"] for frame in merged(found)] == ["token", "block", "block", "token"]
    assert [(f["block"], json.loads(f["partial_json"])) for f in found if f["type"] == "block"] == [
        (1, {"type": "tool_use", "id": "t", "name": "add", "input": {"a": ["é", 1]}}),
        (2, {"type": "redacted_thinking", "data": "x"}),
    ]


async def test_block_over_frame_size_is_split(chat: Client, puppet: Puppet, server: Server) -> None:
    data = "é" * 3 * server.settings.frame_size
    found = await frames(chat, puppet, RedactedThinking(data), Thinking("", data))
    assert len(found) > 6
    block, signature = merged(found)
    assert json.loads(block["partial_json"]) == {"type": "redacted_thinking", "data": data}
    assert signature == {"type": "thinking", "text": "", "block": 1, "signature": data}


async def test_citations_follow_text_of_their_block(chat: Client, puppet: Puppet) -> None:
    outputs = "a", Text("b", {"citations": [CITATION, CITATION]}), "c"
    assert merged(await frames(chat, puppet, *outputs)) == [
        {"type": "token", "text": "a"},
        {"type": "token", "block": 1, "text": "b"},
        {"type": "token", "text": "", "block": 1, "citation": CITATION},
        {"type": "token", "text": "", "block": 1, "citation": CITATION},
        {"type": "token", "block": 2, "text": "c"},
    ]


async def test_citation_over_frame_size_is_sent_whole(
    chat: Client, puppet: Puppet, server: Server
) -> None:
    cited = {"cited_text": "é" * 2 * server.settings.frame_size}
    found = await frames(chat, puppet, Text("a", {"citations": [cited]}), "b")
    assert [frame.get("citation") for frame in found] == [None, cited, None]


async def test_reply_ends_before_oversize_citation(
    chat: Client, puppet: Puppet, server: Server
) -> None:
    cited = {"cited_text": "x" * ESCAPED * server.settings.frame_size}
    start = await chat.prompt()
    (await puppet.reply()).say("a", Text("b", {"citations": [cited]}), "c").end()
    text, done = await chat.text(start["id"])
    assert (text, done["reason"]) == ("ab", "max_tokens")


async def test_lone_surrogate_is_replaced_within_block(chat: Client, puppet: Puppet) -> None:
    outputs = "a\ud83d", Thinking("b\ud83d"), CALL, "\ude00c", ToolUse("t", "\ud83d", {})
    found = merged(await frames(chat, puppet, *outputs))
    assert [frame.get("text") for frame in found] == ["a\ufffd", "b\ufffd", None, "\ufffdc", None]
    assert json.loads(found[-1]["partial_json"])["name"] == "\ufffd"


async def test_resume_after_any_piece_of_any_block_gets_the_rest(
    server: Server, puppet: Puppet
) -> None:
    said = (Thinking("1"), Thinking("2", "s"), "a", "b", CALL, Text("c", {"citations": [CITATION]}))
    async with client(server) as chat:
        start = await chat.prompt()
        model: Reply = await puppet.reply()
        model.say(*said).end()
        done = await chat.next("done")
        whole = [f for f in chat.frames if f["type"] in CONTENT]
    assert done["seq"] == 8
    for after in range(9):
        async with client(server) as chat:
            await chat.send({"type": "resume", "id": start["id"], "after": after})
            assert await chat.next("done") == done
            rest = [f for f in chat.frames if f["type"] in CONTENT]
        assert split(rest) == [
            piece for frame in whole if frame["seq"] > after for piece in split([frame])
        ]


def split(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return each character of the content of frames, with its kind and block."""
    return [
        (frame["type"], frame.get("block", 0), key, character)
        for frame in found
        for key in ("text", "signature", "partial_json", "citation")
        for character in str(frame.get(key, ""))
    ]


async def test_invalid_piece_is_internal_error(chat: Client, puppet: Puppet) -> None:
    for wrong in (Piece("block", 0, "{}"), Piece("citation", 0, "[]"), ToolUse("t", "n", None)):  # type: ignore[arg-type]
        await chat.prompt()
        (await puppet.reply(len(puppet.replies) - 1)).say("a", wrong)
        assert (await chat.next("error"))["code"] == "internal"


async def test_older_client_gets_text_and_thinking(chat: Client, puppet: Puppet) -> None:
    """Older clients ignore unknown types and keys, as PROTOCOL.md says."""
    outputs = Thinking("1", "s"), "a", CALL, Text("b", {"citations": [CITATION]}), "c"
    known = {"type", "text"}
    found = await frames(chat, puppet, *outputs)
    old = [{k: v for k, v in frame.items() if k in known} for frame in found]
    assert all(frame.keys() == known for frame in old if frame["type"] != "block")
    assert "".join(frame["text"] for frame in old if frame["type"] == "token") == "abc"
    assert "".join(frame["text"] for frame in old if frame["type"] == "thinking") == "1"
