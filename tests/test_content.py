"""Blocks and messages are parsed from JSON and dumped whole."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver.content import (
    DEPTH,
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
    dump_block,
    dump_content,
    memory_of,
    parse_block,
    parse_content,
    text_of_block,
)

SOURCE = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
CITATIONS = [{"type": "char_location", "cited_text": "x", "document_index": 0}]

BLOCKS: list[tuple[dict[str, Any], object]] = [
    ({"type": "text", "text": "Hello"}, Text("Hello")),
    (
        {"type": "text", "text": "Hello", "citations": CITATIONS},
        Text("Hello", {"citations": CITATIONS}),
    ),
    ({"type": "thinking", "thinking": "Hm", "signature": "s"}, Thinking("Hm", "s")),
    ({"type": "thinking", "thinking": "Hm"}, Thinking("Hm")),
    ({"type": "redacted_thinking", "data": "x"}, RedactedThinking("x")),
    (
        {"type": "tool_use", "id": "t", "name": "add", "input": {"a": [1, 2.5, {"b": "c"}]}},
        ToolUse("t", "add", {"a": [1, 2.5, {"b": "c"}]}),
    ),
    ({"type": "tool_result", "tool_use_id": "t"}, ToolResult("t")),
    (
        {
            "type": "tool_result",
            "tool_use_id": "t",
            "content": [{"type": "image", "source": SOURCE}],
            "is_error": True,
        },
        ToolResult("t", [{"type": "image", "source": SOURCE}], is_error=True),
    ),
    ({"type": "image", "source": SOURCE}, Image(SOURCE)),
    (
        {"type": "document", "source": SOURCE, "title": "A", "citations": {"enabled": True}},
        Document(SOURCE, {"title": "A", "citations": {"enabled": True}}),
    ),
    (
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
        Other("server_tool_use", {"id": "s", "name": "web_search", "input": {"query": "x"}}),
    ),
    ({"type": "holodeck"}, Other("holodeck")),
]

JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(("value", "block"), BLOCKS, ids=lambda value: type(value).__name__)
def test_block_is_parsed_and_dumped_whole(value: dict[str, Any], block: Any) -> None:
    assert parse_block(value) == block
    assert dump_block(block) == value
    assert parse_block(json.loads(json.dumps(dump_block(block)))) == block


@given(
    known=st.sampled_from([value for value, _ in BLOCKS]),
    more=st.dictionaries(st.text(min_size=1).map("x-".__add__), JSON, max_size=4),
)
def test_unknown_keys_are_kept(known: dict[str, Any], more: dict[str, Any]) -> None:
    assert dump_block(parse_block({**known, **more})) == {**known, **more}


@given(name=st.text(min_size=1, max_size=64), more=st.dictionaries(st.text(), JSON, max_size=4))
def test_unknown_block_type_is_kept_whole(name: str, more: dict[str, Any]) -> None:
    value = more | {"type": f"_{name}"[:64]}
    assert parse_block(value) == Other(
        value["type"], {k: v for k, v in more.items() if k != "type"}
    )
    assert dump_block(parse_block(value)) == value


def test_null_equals_missing_key() -> None:
    assert parse_block({"type": "text", "text": "x", "citations": None}) == Text("x")
    with pytest.raises(ValueError, match=r"^text: missing$"):
        parse_block({"type": "text", "text": None})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "must be a text or a list of blocks"),
        ({"type": "text", "text": "x"}, "must be a text or a list of blocks"),
        (["x"], "0.type: a block is an object with a type"),
        ([{"type": "text", "text": "x"}, {}], "1.type: missing"),
        ([{"type": 1}], "0.type: is not one of a block"),
        ([{"type": "x" * 65}], "0.type: is not one of a block"),
        ([{"type": "text"}], "0.text: missing"),
        ([{"type": "text", "text": ["x"]}], "0.text: must be a text"),
        ([{"type": "image", "source": "x"}], "0.source: must be an object"),
        ([{"type": "tool_result", "tool_use_id": "t", "content": 1}], "0.content: must be a text"),
        (
            [{"type": "tool_result", "tool_use_id": "t", "is_error": 1}],
            "0.is_error: must be true or false",
        ),
        ("\ud83d", "has half of a surrogate pair"),
        ([{"type": "x", "y": [{"z": "\ud83d"}]}], "0.y: has half of a surrogate pair"),
        ([{"type": "x", "y": {"\ud83d": 1}}], "0.y: has half of a surrogate pair"),
        ([{"type": "x", "\ud83d" * 99: 1}], r"0.\\ud83d"),
    ],
)
def test_error_names_key(value: object, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}"):
        parse_content(value)


def test_block_nesting_is_bounded() -> None:
    def nested(depth: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(depth):
            value = [value]
        return {"type": "x", "y": value}

    assert dump_block(parse_block(nested(DEPTH))) == nested(DEPTH)
    with pytest.raises(ValueError, match=r"^y: nested too deeply$"):
        parse_block(nested(DEPTH + 1))
    with pytest.raises(ValueError, match=r"^y: nested too deeply$"):
        parse_block(nested(100_000))


def test_string_content_equals_one_text_block() -> None:
    assert Message("user", "Hello") == Message("user", [Text("Hello")])
    assert Message("assistant", "").blocks == ()
    assert parse_content("Hello") == (Text("Hello"),)
    assert parse_content("") == ()
    assert dump_content((Text("Hello"),)) == "Hello"
    assert dump_content(()) == ""
    assert dump_content((Text("Hello", {"citations": []}),)) != "Hello"
    assert dump_content((Text("a"), Text("b"))) == [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]


def test_message_text_and_thinking_join_blocks() -> None:
    blocks = (Thinking("1", "s"), Text("a"), ToolUse("t", "n", {}), Thinking("2"), Text("b"))
    message = Message("assistant", blocks, "client", model="m", usage=Usage(1, 2))
    assert (message.text, message.thinking) == ("ab", "12")
    assert dataclasses.replace(message, partial=None) == Message(
        "assistant", blocks, model="m", usage=Usage(1, 2)
    )


def test_size_counts_text_or_json() -> None:
    assert Message("user", "grüß").size == 4
    image = Image(SOURCE)
    assert text_of_block(image) == (
        '{"type":"image","source":{"type":"base64","media_type":"image/png","data":"aGVsbG8="}}'
    )
    assert Message("user", (Text("ab"), image)).size == 2 + len(text_of_block(image))


def test_memory_counts_all_values_of_block() -> None:
    small = memory_of(Message("user", [ToolUse("t", "n", {"x": ["y"]})]))
    large = memory_of(Message("user", [ToolUse("t", "n", {"x": ["y" * 10_000]})]))
    assert large - small == 9_999
