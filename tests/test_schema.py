"""The JSON Schema and the AsyncAPI document say what the server does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator

import wsserver
from tests.support.tools import require_npm_package
from wsserver import Code, Settings
from wsserver.errors import Refused
from wsserver.protocol import CLIENT_FRAMES, SERVER_FRAMES, parse
from wsserver.schema import asyncapi, json_schema

SCHEMA = json_schema()
PROTOCOL = (Path(wsserver.__file__).parent / "PROTOCOL.md").read_text()
FRAMES = re.findall(r"^([→←]) (\{.*\})$", PROTOCOL, re.MULTILINE)
ID = "0123456789abcdef"

CLIENT = Draft202012Validator({"$ref": "#/$defs/client", "$defs": SCHEMA["$defs"]})
SERVER = Draft202012Validator({"$ref": "#/$defs/server", "$defs": SCHEMA["$defs"]})


def test_schema_is_valid_and_names_every_frame_by_side() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    definitions = SCHEMA["$defs"]

    def types(side: str) -> set[str]:
        names = [entry["$ref"].rpartition("/")[2] for entry in definitions[side]["anyOf"]]
        return {definitions[name]["properties"]["type"]["const"] for name in names}

    assert types("client") == set(CLIENT_FRAMES)
    assert types("server") == {model.model_fields["type"].default for model in SERVER_FRAMES}
    assert set(definitions["Code"]["enum"]) == {code.value for code in Code}


ids = st.sampled_from([ID, "another-valid-id", "short", "a/b" * 8, "", None, 5])
texts = st.sampled_from(["Hello", "x" * 201, "", " ", None, 5, True])
numbers = st.sampled_from([0, 1, 2, 100, 101, -1, 0.5, 2.5, True, None, "1"])
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", None])},
    optional={"content": texts, "more": st.just(1)},
)
frames = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from([*CLIENT_FRAMES, "token", "", None, 5]),
        "prompt": texts,
        "messages": st.lists(turns, max_size=2) | st.none(),
        "id": ids,
        "conversation": ids,
        "on_busy": st.sampled_from(["reject", "queue", "interrupt", "wait", None]),
        "retry_of": ids,
        "request": st.sampled_from(["r1", "", "a b", "x" * 65, None, 5]),
        "model": texts,
        "system": texts,
        "max_tokens": numbers,
        "temperature": numbers,
        "after": numbers,
        "before": numbers | texts,
        "limit": numbers,
        "title": texts,
        "token": texts,
        "unknown": st.just(1),
    },
)
kinds = st.sampled_from([*CLIENT_FRAMES])
# Frames of one type with the keys of that type, which are far more often valid.
likely = kinds.flatmap(
    lambda kind: frames.map(
        lambda frame: (
            {"type": kind}
            | {
                key: frame[key]
                for key in CLIENT_FRAMES[kind].model_fields
                if key in frame and key != "type"
            }
        )
    )
)


@hypothesis_settings(max_examples=500)
@given(frames | likely)
def test_schema_accepts_the_frames_that_the_server_accepts(frame: dict[str, Any]) -> None:
    valid = CLIENT.is_valid(frame)
    try:
        parse(json.dumps(frame))
    except Refused as refused:
        # The order of a list is what the schema cannot tell.
        assert not valid or "the last message must be the user's" in refused.message
    else:
        assert valid


@pytest.mark.parametrize(
    "frame",
    [
        {},
        {"conversation": ID},
        {"type": "prompt"},
        {"type": "delete"},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "conversation": ID},
        {"messages": []},
    ],
)
def test_schema_refuses_incomplete_frames(frame: dict[str, Any]) -> None:
    assert not CLIENT.is_valid(frame)
    with pytest.raises(Refused):
        parse(json.dumps(frame))


@pytest.mark.parametrize(("direction", "text"), FRAMES)
def test_schema_accepts_the_frames_of_the_document(direction: str, text: str) -> None:
    frame = json.loads(re.sub(r'"(ID\d?|C)"', r'"\1-0123456789abcdef"', text))
    (CLIENT if direction == "→" else SERVER).validate(frame)


@pytest.mark.parametrize("text", [text for direction, text in FRAMES if direction == "←"])
def test_schema_lets_servers_say_more_and_requires_what_they_always_say(text: str) -> None:
    frame = json.loads(text)
    assert SERVER.is_valid(frame | {"of_a_later_version": 1})
    assert not SERVER.is_valid({key: value for key, value in frame.items() if key != "type"})
    assert not any(SERVER.is_valid(frame | {key: None}) for key in frame)


def test_asyncapi_document_names_every_frame_and_its_answer() -> None:
    document = asyncapi()
    operations = document["operations"]
    assert set(operations) == {"send", *(f"receive_{kind}" for kind in CLIENT_FRAMES)}
    for message in document["components"]["messages"].values():
        name = message["payload"]["$ref"].rpartition("/")[2]
        assert name in document["components"]["schemas"]
        assert message["summary"]
    for operation in operations.values():
        for reference in operation["messages"] + operation.get("reply", {}).get("messages", []):
            assert reference["$ref"].rpartition("/")[2] in document["channels"]["chat"]["messages"]
    assert (
        document["servers"]["local"]["host"] == f"localhost:{Settings.model_fields['port'].default}"
    )


@pytest.mark.slow
def test_asyncapi_document_is_valid() -> None:
    folder = require_npm_package("@asyncapi/specs")
    Draft7Validator(json.loads((folder / "schemas/3.0.0.json").read_text())).validate(asyncapi())
