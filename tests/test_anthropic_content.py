"""Content blocks from and to the Messages API."""

import json
from typing import Any

import pytest

from tests.support.upstream import delta, event
from wsserver.content import (
    Block,
    Document,
    Image,
    Message,
    Other,
    RedactedThinking,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    Usage,
)
from wsserver.generation import End
from wsserver.models.anthropic.reply import MessagesReply
from wsserver.models.anthropic.request import arguments
from wsserver.models.base import Output, Request
from wsserver.pieces import Piece
from wsserver.settings import Settings

RESULT = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"title": "é"}]}
SEARCH = {"type": "server_tool_use", "id": "s", "name": "web_search"}
CITATION = {"type": "web_search_result_location", "cited_text": "x"}
IMAGE = {"type": "base64", "media_type": "image/png", "data": "aGk="}


def start(index: int, **block: object) -> bytes:
    return event("content_block_start", index=index, content_block=block)


def stop(index: int) -> bytes:
    return event("content_block_stop", index=index)


def outputs(*events: bytes) -> list[Output]:
    """Return the output of the model, without counts; each event is a separate read."""
    found: list[Output] = []
    reply = MessagesReply(found.append, 1000, None)
    for data in events:
        reply.feed(data)
    return [item for item in found if not isinstance(item, Usage | End) and item != ""]


def test_thinking_has_signature() -> None:
    assert outputs(
        start(0, type="thinking", thinking="", signature=""),
        delta("thinking_delta", 0, "thinking", "Hm"),
        delta("signature_delta", 0, "signature", "abc"),
        stop(0),
    ) == [Piece("thinking", 0, ""), Thinking("Hm"), Piece("signature", 0, "abc")]


def test_text_blocks_have_separate_indexes() -> None:
    assert outputs(
        start(0, type="text", text=""),
        delta("text_delta", 0, "text", "a"),
        stop(0),
        start(1, type="text", text="", citations=[]),
        event(
            "content_block_delta", index=1, delta={"type": "citations_delta", "citation": CITATION}
        ),
        delta("text_delta", 1, "text", "b"),
        stop(1),
    ) == [
        Piece("text", 0, ""),
        "a",
        Piece("text", 1, ""),
        Piece("citation", 1, json.dumps(CITATION)),
        "b",
    ]


def test_redacted_and_tool_blocks_arrive_whole() -> None:
    assert outputs(
        start(0, type="redacted_thinking", data="secret"),
        stop(0),
        start(1, **SEARCH, input={}),
        delta("input_json_delta", 1, "partial_json", ""),
        delta("input_json_delta", 1, "partial_json", '{"query": "\\ud83d'),
        delta("input_json_delta", 1, "partial_json", '"}'),
        stop(1),
        start(2, **RESULT),
        stop(2),
        start(3, type="tool_use", id="t", name="add", input={}),
        stop(3),
    ) == [
        RedactedThinking("secret"),
        Other("server_tool_use", {"id": "s", "name": "web_search", "input": {"query": "\ufffd"}}),
        Other("web_search_tool_result", {"tool_use_id": "s", "content": [{"title": "é"}]}),
        ToolUse("t", "add", {}),
    ]


def sent(*messages: Message) -> list[Any]:
    request = Request(messages, "claude", 100)
    settings = Settings(prompt_caching=False)
    body = arguments(request, settings, takes_temperature=True)
    return [message["content"] for message in body["messages"]]


SIGNED = (Thinking("Hm", "s"), RedactedThinking("x"), Text("Hi"))
CALL = ToolUse("t", "add", {"a": 1})


@pytest.mark.parametrize(
    ("blocks", "answer", "content"),
    [
        # Thinking is sent only with a tool call whose result follows.
        (SIGNED, "Go on", "Hi"),
        ((Thinking("Hm"), Text("Hi"), Text(" there")), "Go on", "Hi there"),
        (
            (*SIGNED, CALL),
            [ToolResult("t", "2")],
            [
                {"type": "thinking", "thinking": "Hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Hi"},
                {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}},
            ],
        ),
        # The API refuses thinking without a signature, and the call of a tool without its result.
        (
            (Thinking("Hm"), CALL),
            [ToolResult("t", "2")],
            [{"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}],
        ),
        ((*SIGNED, CALL), "Go on", "Hi"),
        ((*SIGNED, CALL), [ToolResult("other", "2")], "Hi"),
        ((Other("server_tool_use", {"id": "s"}), Text("Hi")), "Go on", "Hi"),
        (
            (Other("server_tool_use", {"id": "s"}), Other("x", {"tool_use_id": "s"}), Text("Hi")),
            "Go on",
            [
                {"type": "server_tool_use", "id": "s"},
                {"type": "x", "tool_use_id": "s"},
                {"type": "text", "text": "Hi"},
            ],
        ),
    ],
)
def test_reply_in_history_is_sent_as_api_requires(
    blocks: tuple[Block, ...], answer: Any, content: Any
) -> None:
    question = Message("user", "Hello")
    reply = Message("assistant", blocks)
    assert sent(question, reply, Message("user", answer))[1] == content
    # A reply is sent in the same form in later requests, for the prompt cache.
    more = Message("assistant", "Yes"), Message("user", "And then?")
    assert sent(question, reply, Message("user", answer), *more)[1] == content


def test_prompt_with_image_and_document_is_sent_whole() -> None:
    blocks = (Image(IMAGE), Document({"type": "text"}, {"title": "A"}), Text("What is this?"))
    assert sent(Message("user", blocks)) == [
        [
            {"type": "image", "source": IMAGE},
            {"type": "document", "source": {"type": "text"}, "title": "A"},
            {"type": "text", "text": "What is this?"},
        ]
    ]


def test_cache_breakpoint_is_on_last_block_of_message() -> None:
    asked = Message("user", (Text("a"), Image(IMAGE)))
    messages = [asked, Message("assistant", "b"), *[Message("user", "c")] * 30]
    body = arguments(Request(tuple(messages), "claude", 100), Settings(), takes_temperature=True)
    assert [list(block) for block in body["messages"][0]["content"]] == [
        ["type", "text"],
        ["type", "source", "cache_control"],
    ]
