"""Records of this version and of the first version are read back."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver.content import Image, Message, Other, Text, Thinking, Usage
from wsserver.errors import Code
from wsserver.pieces import Piece, Pieces
from wsserver.protocol import Done, Error, Prompt
from wsserver.stores.records import (
    VERSION,
    Packed,
    content_in,
    dump_batch,
    dump_prompt,
    dump_terminal,
    parse_batch,
    parse_prompt,
    parse_terminal,
)

pieces = st.lists(
    st.builds(
        Piece,
        st.sampled_from(["text", "thinking", "signature", "citation", "block"]),
        st.integers(0, 3),
        st.text(max_size=5),
    ),
    max_size=30,
)


@given(pieces)
def test_packed_pieces_are_unpacked(given_pieces: list[Piece]) -> None:
    assert list(Packed.of(Pieces(given_pieces)).pieces()) == given_pieces


@given(st.lists(st.tuples(st.booleans(), st.text(min_size=1, max_size=5)), max_size=20))
def test_blocks_of_packed_pieces_equal_blocks_of_pieces(said: list[tuple[bool, str]]) -> None:
    given_pieces = Pieces()
    for number, (thinking, text) in enumerate(said):
        given_pieces.extend("thinking" if thinking else "text", number // 3 * 2 + thinking, [text])
    assert Packed.of(given_pieces).blocks() == given_pieces.blocks()


@given(pieces, st.lists(st.integers(0, 30), max_size=5))
def test_batches_of_any_size_give_same_pieces(given_pieces: list[Piece], cuts: list[int]) -> None:
    whole, read = Pieces(given_pieces), Pieces()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 30], strict=True):
        parse_batch(dump_batch(Pieces(list(whole)[start:end])), read, min(start, len(whole)))
    assert list(read) == given_pieces


def test_records_of_version_1_are_read() -> None:
    packed = Packed("abc", "xyz", "[1,-3,-2,2]", None)
    assert list(packed.pieces()) == [
        ("text", 0, "a"),
        ("thinking", 1, "xy"),
        ("thinking", 1, "z"),
        ("text", 2, "bc"),
    ]
    assert packed.blocks() == (Text("a"), Thinking("xyz"), Text("bc"))
    read = Pieces()
    parse_batch('["a", ["xy"]]', read, 0)
    parse_batch('[["z"], "bc"]', read, 2)
    assert read == packed.pieces()


PROMPTS = [
    Prompt(prompt="Hi"),
    Prompt(prompt=(Text("Hi"), Image({"type": "url", "url": "x"}), Other("x", {"a": [None]}))),
    Prompt(messages=[Message("user", "a"), Message("assistant", "b"), Message("user", "c")]),
    Prompt(
        prompt="Hi",
        id="0123456789abcdef",
        conversation="conversation-one",
        on_busy="interrupt",
        retry_of="0123456789abcdeg",
        model="m",
        system="s",
        max_tokens=5,
        temperature=0.5,
    ),
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_is_read_back(prompt: Prompt) -> None:
    record = dump_prompt(prompt)
    assert json.loads(record)["v"] == VERSION
    assert parse_prompt(record) == parse_prompt(record.encode()) == prompt
    if prompt.messages is None:
        assert content_in(record) == prompt.new_messages[0].blocks
    else:
        assert content_in(record) == ()
    old = prompt.model_dump_json(exclude_none=True)  # the record of the first version
    assert parse_prompt(old) == prompt


TOKENS = Usage(input_tokens=1, output_tokens=2, cache_read_input_tokens=3, estimated=True)
TERMINALS = [
    Done(id="g", seq=0, reason="end_turn", usage=TOKENS),
    Done(id="g", seq=3, reason="stopped", by="timeout", usage=TOKENS, thought=12.5),
    Error(code=Code.TIMEOUT, message="m", id="g", seq=1, retryable=True, ref="r", thought=0.0),
    Error(
        code=Code.RATE_LIMITED,
        message="m",
        id="g",
        seq=1,
        retryable=True,
        retry_after=1.5,
        usage=TOKENS,
        ref="r",
    ),
]


@pytest.mark.parametrize("terminal", TERMINALS)
def test_terminal_is_read_back(terminal: Done | Error) -> None:
    record = dump_terminal(terminal)
    assert json.loads(record)["v"] == VERSION
    assert parse_terminal(record, "g") == terminal
    assert parse_terminal(terminal.model_dump_json(exclude_none=True), "g") == terminal


@pytest.mark.parametrize("version", [0, VERSION + 1, "2", None])
def test_unknown_version_is_refused(version: Any) -> None:
    record = json.dumps({"v": version, "prompt": "Hi", "type": "done"})
    for load in (parse_prompt, content_in, lambda record: parse_terminal(record, "g")):
        with pytest.raises(ValueError, match="version"):
            load(record)


@pytest.mark.parametrize("record", ["[]", "5", "{", '{"v":2,"messages":[{"role":"x"}]}'])
def test_damaged_prompt_raises_value_error(record: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_prompt(record)


@pytest.mark.parametrize(
    "record",
    [
        "{}",
        "5",
        "[[1]]",
        '[["a", "b"]]',
        '{"v":2,"runs":[["text",0]]}',
        '{"v":2,"runs":[["moon",0,["a"]]]}',
        '{"v":2,"runs":[["text","0",["a"]]]}',
        '{"v":2,"runs":[["text",0,[1]]]}',
        '{"v":2,"runs":[[["text"],0,["a"]]]}',
    ],
)
def test_damaged_batch_raises_value_error(record: str) -> None:
    with pytest.raises(ValueError, match=r"^a batch of pieces is damaged$"):
        parse_batch(record, Pieces(), 0)


@pytest.mark.parametrize("runs", ["5", "[5]", '[["text",0]]', '[[["text"],0,1]]', '[["text",0,9]]'])
def test_damaged_runs_raise_value_error(runs: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Packed("a", "b", "[1,1]", runs).pieces()
