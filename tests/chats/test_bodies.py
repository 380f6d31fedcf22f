"""No body of a request makes the server fail, however its JSON is shaped."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver.chats.http import decode_body, parse_prompt
from wsserver.content import Message
from wsserver.dialects import ag_ui, ai_sdk
from wsserver.errors import Refused

KEYS = (
    *("id", "threadId", "runId", "messages", "role", "parts", "content", "type", "text", "url"),
    *("mediaType", "source", "value", "mimeType", "model", "max_tokens", "temperature", "trigger"),
    *("system", "forwardedProps", "prompt", "state", "tools", "context"),
)
TEXTS = (
    *("user", "assistant", "system", "developer", "tool", "text", "file", "image", "document"),
    *("url", "data", "data:image/png;base64,AAAA", "regenerate-message", "\ud800", "", "a" * 16),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=6)
    ),
    max_leaves=20,
)
parts = st.dictionaries(st.sampled_from(KEYS), values, max_size=4) | values
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(TEXTS) | values,
        "parts": st.lists(parts, max_size=3) | values,
        "content": st.lists(parts, max_size=3) | values,
    },
)
bodies = st.fixed_dictionaries(
    {"messages": st.lists(messages | values, max_size=3)},
    optional={key: st.sampled_from(TEXTS) | values for key in KEYS if key != "messages"},
)


@given(bodies)
def test_chat_of_any_shape_is_parsed_or_refused(body: dict[str, Any]) -> None:
    for dialect in (ai_sdk, ag_ui):
        with contextlib.suppress(Refused):
            chat = dialect.parse_chat(body)
            parse_prompt({**chat.keys, "messages": chat.messages})


known = st.fixed_dictionaries(
    {
        "id": st.sampled_from(("\ud800", "", "a", "id", 5)),
        "role": st.sampled_from(("user", "assistant")),
        "content": st.just("x"),
    }
)


@given(st.lists(known | values, max_size=3) | values)
def test_snapshot_for_messages_of_any_shape_is_encoded(given_messages: object) -> None:
    history = [Message("user", "x", id="id"), Message("assistant", "x", id="id")]
    run = {"threadId": "thread", "runId": "run", "messages": given_messages}
    dialect = ag_ui.AgUi(run, history)
    events = dialect.without_reply().decode().split("\n\n")
    shown = json.loads(events[1].removeprefix("data: "))["messages"]
    assert [(m["role"], m["content"]) for m in shown] == [("user", "x"), ("assistant", "x")]


@given(bodies | values)
def test_body_of_any_shape_is_parsed_or_refused(body: object) -> None:
    with contextlib.suppress(Refused):
        decoded = decode_body({"content-type": "application/json"}, json.dumps(body).encode())
        ai_sdk.recognizes(decoded)
        parse_prompt(decoded)


@pytest.mark.parametrize("role", [{}, [], None, 5])
def test_message_with_a_role_of_another_type_is_refused(role: object) -> None:
    message = {"role": role, "content": "x", "parts": [{"type": "text", "text": "x"}]}
    body = {"id": "chat", "threadId": "chat", "runId": "run", "messages": [message]}
    with pytest.raises(Refused):
        parse_prompt({"messages": ai_sdk.parse_chat(body).messages})
    with pytest.raises(Refused):
        ag_ui.parse_chat(body)
