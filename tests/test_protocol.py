import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver.errors import Code, Refused
from wsserver.generation import Run, Usage
from wsserver.protocol import (
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
    UsageCounts,
    encode,
    encode_run,
    parse,
)


def test_the_shortest_frame_is_a_prompt() -> None:
    assert parse('{"prompt": "Hello"}') == Prompt(prompt="Hello")
    assert parse('{"messages": [{"role": "user", "content": "x"}]}').type == "prompt"
    assert parse('{"type": "stop"}') == Stop()
    assert parse('{"type": "ping"}') == Ping()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 10**6), st.booleans())
def test_the_fast_encoding_of_text_is_that_of_the_model(
    text: str, seq: int, thinking: bool
) -> None:
    kind = ThinkingFrame if thinking else Token
    frame = kind(id="0123456789abcdef", seq=seq, text=text)
    fast = encode_run("0123456789abcdef", Run(seq, text, thinking))
    assert json.loads(fast) == json.loads(encode(frame))
    assert list(json.loads(fast)) == list(json.loads(encode(frame)))


@given(st.text())
def test_whatever_is_received_is_parsed_or_refused_with_a_message_that_can_be_sent(
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
def test_whatever_json_is_received_is_parsed_or_refused(value: object) -> None:
    try:
        frame = parse(json.dumps(value))
    except Refused as refused:
        assert 0 < len(refused.message.encode()) < 500
    else:
        assert isinstance(frame, ClientFrame)


def test_keys_without_a_value_are_left_out() -> None:
    usage = UsageCounts.of(Usage(1, 2))
    assert encode(Pong()) == b'{"type":"pong"}'
    assert encode(Start(id="i", model="m")) == b'{"type":"start","id":"i","model":"m"}'
    assert encode(Done(id="i", seq=0, reason="end_turn", usage=usage)) == (
        b'{"type":"done","id":"i","seq":0,"reason":"end_turn",'
        b'"usage":{"input_tokens":1,"output_tokens":2}}'
    )
    assert encode(Error(code=Code.BUSY, message="m", retryable=True, ref="r")) == (
        b'{"type":"error","code":"busy","message":"m","retryable":true,"ref":"r"}'
    )


def test_a_key_given_twice_among_thousands_is_found_quickly() -> None:
    keys = ", ".join(f'"k{number}": 0' for number in range(5000))
    with pytest.raises(Refused, match="k4999: given twice"):
        parse(f'{{{keys}, "k4999": 1}}')
