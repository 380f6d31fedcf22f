import json
import tracemalloc
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support.work import counted
from wsserver import parsing
from wsserver.content import Usage
from wsserver.encoding import encode, encode_run
from wsserver.errors import Code, Refused
from wsserver.parsing import DEPTH, KEYS, count_parts, parse
from wsserver.pieces import Kind, Run
from wsserver.protocol import (
    MESSAGES,
    BlockFrame,
    ClientFrame,
    Done,
    Error,
    Ping,
    Pong,
    Prompt,
    Start,
    Stop,
    ThinkingFrame,
    Token,
)


def test_shortest_frame_is_a_prompt() -> None:
    assert parse('{"prompt": "Hello"}') == Prompt(prompt="Hello")
    assert parse('{"messages": [{"role": "user", "content": "x"}]}').type == "prompt"
    assert parse('{"type": "stop"}') == Stop()
    assert parse('{"type": "ping"}') == Ping()


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(1, 10**6),
    st.integers(0, 3),
    st.sampled_from(get_args(Kind)),
)
def test_fast_encoding_of_run_equals_pydantic_encoding(
    data: str, seq: int, block: int, kind: Kind
) -> None:
    about: dict[str, Any] = {"id": "0123456789abcdef", "seq": seq, "block": block or None}
    frames: dict[Kind, Callable[[], Token | ThinkingFrame | BlockFrame]] = {
        "text": lambda: Token(**about, text=data),
        "thinking": lambda: ThinkingFrame(**about, text=data),
        "signature": lambda: ThinkingFrame(**about, text="", signature=data),
        "citation": lambda: Token(**about, text="", citation={"cited_text": data}),
        "block": lambda: BlockFrame(**about, partial_json=data),
    }
    given = json.dumps({"cited_text": data}) if kind == "citation" else data
    fast = encode_run("0123456789abcdef", Run(seq, kind, block, given))
    assert json.loads(fast) == json.loads(encode(frames[kind]()))


@given(st.text())
def test_any_text_is_parsed_or_refused_with_encodable_message(
    text: str,
) -> None:
    try:
        parse(text)
    except Refused as refused:
        assert 0 < len(refused.message.encode()) < 500


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "prompt", "messages", "id", "stop"]) | st.text(),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    try:
        frame = parse(json.dumps(value))
    except Refused as refused:
        assert 0 < len(refused.message.encode()) < 500
    else:
        assert isinstance(frame, ClientFrame)


def test_keys_without_value_are_omitted() -> None:
    usage = Usage(1, 2)
    assert encode(Pong()) == b'{"type":"pong"}'
    assert encode(Start(id="i", model="m")) == b'{"type":"start","id":"i","model":"m"}'
    assert encode(Done(id="i", seq=0, reason="end_turn", usage=usage)) == (
        b'{"type":"done","id":"i","seq":0,"reason":"end_turn",'
        b'"usage":{"input_tokens":1,"output_tokens":2}}'
    )
    assert encode(Error(code=Code.BUSY, message="m", retryable=True, ref="r")) == (
        b'{"type":"error","code":"busy","message":"m","retryable":true,"ref":"r"}'
    )


def test_error_names_repeated_key_among_maximum_of_keys() -> None:
    keys = ", ".join(f'"k{number}": 0' for number in range(KEYS - 1))
    with pytest.raises(Refused, match="k7: given twice"):
        parse(f'{{{keys}, "k7": 1}}')


@pytest.mark.parametrize(
    ("frame", "meant"),
    [
        ('{"prompt": "x", "id": null, "colour": null}', '{"prompt": "x"}'),
        ('{"type": null, "prompt": "x"}', '{"prompt": "x"}'),
        ('{"type": "list", "limit": null}', '{"type": "list"}'),
        (
            '{"messages": [{"role": "user", "content": "x", "name": null}], "prompt": null}',
            '{"messages": [{"role": "user", "content": "x"}]}',
        ),
    ],
)
def test_null_equals_missing_key(frame: str, meant: str) -> None:
    assert parse(frame) == parse(meant)


def test_null_for_required_key_is_refused() -> None:
    for frame in ('{"type": "resume", "id": null}', '{"messages": [null]}', '{"prompt": null}'):
        with pytest.raises(Refused) as raised:
            parse(frame)
        assert raised.value.code is Code.INVALID_FRAME


# The cost of parsing.

MESSAGE = '{"role": "user", "content": "a"}'
COSTLY = {
    "empty messages": '{"messages": [' + ",".join(["{}"] * 21_000) + "]}",
    "as many empty messages as pass": '{"messages": [' + ",".join(["{}"] * 2950) + "]}",
    "numbers for messages": '{"messages": [' + ",".join(["0"] * 32_000) + "]}",
    "messages": '{"messages": [' + ",".join([MESSAGE] * 1900) + "]}",
    "one message too many": '{"messages": [' + ",".join([MESSAGE] * (MESSAGES + 1)) + "]}",
    "keys": '{"prompt": "x",' + ",".join(f'"{n:x}":0' for n in range(7000)) + "}",
    "keys of a message": '{"messages": [{' + ",".join(f'"{n:x}":0' for n in range(7000)) + "}]}",
    "the same key": "{" + ",".join(['"a":0'] * 10_000) + "}",
    "objects for a type": '{"type":[' + ",".join(f'{{"{n:x}":"{n}"}}' for n in range(3000)) + "]}",
    "lists for a type": '{"type":[' + ",".join(f"[{n}]" for n in range(300, 3000)) + "]}",
    "floats": '{"type": [' + ",".join(["1.234"] * 10_000) + "]}",
    "long numbers": '{"type": [' + ",".join(["9" * 4300] * 15) + "]}",
    "a long number": '{"max_tokens": ' + "9" * 64_000 + "}",
    "a long type": '{"type": "' + "x" * 64_000 + '"}',
    "a long key": '{"' + "x" * 64_000 + '": 1, "prompt": "x"}',
    "a long title": '{"type": "rename", "conversation": "0123456789abcdef", "title": "'
    + "x" * 64_000
    + '"}',
    "lists in lists": "[" * 64_000,
    "lists in lists beside others": '{"type":' + "[[]," * 2000 + "0" + "]" * 2000 + "}",
    "objects in objects": '{"a":' * 10_000,
    "quotes": '"' * 65_000,
    "escaped quotes": '"\\' * 32_000,
    "escapes": '\\"' * 32_000,
}


@pytest.mark.parametrize("frame", COSTLY.values(), ids=COSTLY.keys())
def test_unusable_frame_uses_little_memory_and_few_errors(frame: str) -> None:
    assert len(frame) <= 65_536
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as raised:
            parse(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    found = raised.value.__context__
    assert not isinstance(found, ValidationError) or found.error_count() <= 2
    assert len(raised.value.message) < 200


@pytest.mark.parametrize("gap", ["", " " * 10, ":" * 100], ids=["tight", "wide", "wider"])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_depth_check_takes_linear_work(pair: str, gap: str) -> None:
    group = (pair[0] + gap) * DEPTH + pair[1] * DEPTH  # the maximum depth, repeated
    frame = group * (65_536 // len(group))
    with counted() as work, pytest.raises(Refused) as raised:
        parse(frame)
    assert "nested" not in raised.value.message
    assert work.instructions < 30 * 2 * parsing.PARTS
    with pytest.raises(Refused, match="nested too deeply"):
        parse(group + pair[0] * (DEPTH + 1))


def test_parts_ignore_strings() -> None:
    said = json.dumps({"prompt": '{"a": [1, 2]}, \\ " \\" [[[[' * 1000, "id": "\\"})
    assert count_parts(said) == 4
    assert count_parts('{"a": [1, 2], "b": "unfinished, [') == 6


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text('"\\\\[]{}:,ab\U0001f600'),
        lambda inner: st.lists(inner) | st.dictionaries(st.text('"\\\\[]{}:,ab'), inner),
    ),
    st.booleans(),
)
def test_parts_count_brackets_commas_and_colons(value: object, ascii_only: bool) -> None:
    def count(value: object) -> int:
        if not isinstance(value, list | dict):
            return 0
        inner = value.values() if isinstance(value, dict) else value
        colons = len(value) if isinstance(value, dict) else 0
        return 1 + max(0, len(value) - 1) + colons + sum(map(count, inner))

    assert count_parts(json.dumps(value, ensure_ascii=ascii_only)) == count(value)


def test_prompt_with_long_code_is_accepted() -> None:
    text = '{"a": [[[{"b": "\\\\", "c": [1, 2, 3]}]]]},' * 700
    assert parse(json.dumps({"prompt": text})) == Prompt(prompt=text)


def test_maximum_of_messages_is_accepted() -> None:
    frame = parse('{"messages": [' + ",".join([MESSAGE] * MESSAGES) + "]}")
    assert isinstance(frame, Prompt)
    assert len(frame.messages or ()) == MESSAGES
