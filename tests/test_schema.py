import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator
from pydantic import BaseModel

from tests.support.schemas import OF_CLIENT, OF_SERVER, of
from tests.support.tools import require_npm_package
from wsserver.content import Message, Role, Text, Thinking, Usage
from wsserver.encoding import encode
from wsserver.errors import Code, Refused
from wsserver.parsing import parse
from wsserver.protocol import ANSWERS, CLIENT_FRAMES, SERVER_FRAMES, Ping, ServerFrame
from wsserver.schema import asyncapi, json_schema

ID = "0123456789abcdef"


def nodes(value: object) -> Iterator[dict[str, Any]]:
    """Yield every object in a JSON value."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


def test_schema_is_valid_and_has_every_frame() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert "``" not in json.dumps(schema)
    for side, frames in (("client", CLIENT_FRAMES), ("server", SERVER_FRAMES)):
        names = [entry["$ref"].rpartition("/")[2] for entry in schema["$defs"][side]["anyOf"]]
        types = {json.dumps(schema["$defs"][name]["properties"]["type"]) for name in names}
        assert len(types) == len(frames)
        assert all(any(f'"{name}"' in shown for shown in types) for name in frames)
    codes = schema["$defs"]["Code"]["anyOf"]
    assert {code.get("const") for code in codes} == {*Code, None}


def test_every_client_frame_has_answers() -> None:
    assert ANSWERS.keys() == CLIENT_FRAMES.keys()
    for name in ANSWERS.values():
        assert "request" in SERVER_FRAMES[name].model_fields


@pytest.mark.parametrize(
    "frame",
    [
        {},
        {"conversation": ID},
        {"id": ID},
        {"title": "T", "conversation": ID},
        {"token": "t"},
        {"type": "prompt"},
        {"prompt": None},
        {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "Hi"}], "conversation": ID},
        {"messages": [{"role": "user", "content": "Hi"}], "retry_of": ID},
        {"messages": [{"role": "user", "content": "Hi", "name": "x"}]},
        {"prompt": " \n"},
        {"type": "ping", "prompt": "Hi"},
        {"type": "delete"},
        {"type": "resume", "id": ID + "\n"},
        {"type": None},
        [],
        "stop",
        None,
    ],
)
def test_invalid_client_frame_fails_schema_and_is_refused(frame: Any) -> None:
    assert not OF_CLIENT.is_valid(frame)
    with pytest.raises(Refused):
        parse(json.dumps(frame))


@pytest.mark.parametrize(
    "frame",
    [
        {"prompt": "Hi"},
        {"type": "prompt", "prompt": "Hi", "messages": None, "on_busy": None},
        {"type": None, "prompt": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}], "conversation": None},
        {"type": "stop"},
        {"type": "list", "limit": None, "before": None},
    ],
)
def test_null_equals_missing_key(frame: Any) -> None:
    OF_CLIENT.validate(frame)
    parse(json.dumps(frame))


TEXTS = st.sampled_from(["Hi", "", " ", "\x1f\x85\u2029", "\ufeff", "🦆", "x" * 300, "é\n"])
NAMES = st.sampled_from([ID, "short", ID + "\n", "-" * 64, "_" * 65, "ä" * 16, ""])
WHOLE = st.sampled_from([0, 1, 2, 100, 101, -1, 10**30, True]) | st.integers()
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS},
    optional={"id": st.none(), "name": st.none() | TEXTS},
)
KEYS: dict[str, st.SearchStrategy[object]] = {
    "prompt": TEXTS,
    "messages": st.lists(TURNS, max_size=3),
    "id": NAMES,
    "conversation": NAMES,
    "on_busy": st.sampled_from(["reject", "queue", "interrupt", "wait"]),
    "retry_of": NAMES,
    "model": TEXTS,
    "system": TEXTS,
    "max_tokens": WHOLE,
    "temperature": st.sampled_from([0, 0.5, 2, 2.1, -1, 1e300]) | st.floats(allow_nan=False),
    "request": st.sampled_from(["R", "r" * 65, "", "r r"]),
    "token": st.sampled_from(["t", "", "t" * 8193]),
    "after": WHOLE,
    "before": WHOLE | TEXTS,
    "size": WHOLE,
    "limit": WHOLE,
    "title": TEXTS,
    "unknown": TEXTS,
}
SCALARS: list[object] = [None, True, False, 0, 7, "x"]
ANYTHING = st.sampled_from([*SCALARS, [], {}])


@st.composite
def frames(draw: st.DrawFn) -> dict[str, Any]:
    """Draw frames of which about half are valid: the keys of a type, and at most two others."""
    kind = draw(st.sampled_from([*CLIENT_FRAMES, "unknown", ""]))
    frame: dict[str, Any] = {"type": kind} if kind and draw(st.integers(0, 3)) else {}
    model = CLIENT_FRAMES.get(kind or "prompt")
    known = [] if model is None else [name for name in model.model_fields if name != "type"]
    for name in draw(st.lists(st.sampled_from([*known, "request"]), unique=True)):
        frame[name] = draw(KEYS[name])
    for name in draw(st.lists(st.sampled_from([*KEYS, "type"]), max_size=draw(st.integers(0, 2)))):
        frame[name] = draw(st.none() | KEYS.get(name, TEXTS) | ANYTHING)
    return frame


def without_null(value: Any) -> Any:
    """Leave out the keys whose value is null."""
    if isinstance(value, dict):
        return {k: without_null(inner) for k, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list) else value


def beyond_json_schema(frame: dict[str, object]) -> bool:
    """Whether a frame breaks one of the rules that the schema's description names."""
    messages = frame.get("messages")
    if isinstance(messages, list) and messages:
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") != "user":
            return True
    whole = (frame.get(name) for name in ("max_tokens", "after", "before", "limit", "size"))
    return any(isinstance(value, float) and value.is_integer() for value in whole)


@settings(max_examples=500)
@given(frames())
@example({"prompt": "Hi", "temperature": 1})
@example({"messages": [{"role": "assistant", "content": "Hi"}]})
@example({"type": "open", "conversation": ID, "before": 1.0})
@example({"type": "open", "conversation": ID, "before": 10**18})
@example({"type": "open", "conversation": ID, "before": 10**18 - 1})
def test_server_accepts_exactly_frames_valid_by_schema(frame: dict[str, Any]) -> None:
    try:
        parse(json.dumps(frame))
    except Refused:
        accepted = False
    else:
        accepted = True
    event(f"accepted: {accepted}")
    valid = OF_CLIENT.is_valid(without_null(frame))
    if beyond_json_schema(frame):
        assert not accepted
    else:
        assert valid is accepted
    model = CLIENT_FRAMES.get(str(frame.get("type") or "prompt"), Ping)
    if frame.keys() <= model.model_fields.keys() - {"messages"}:  # whose turns have unknown keys
        assert OF_CLIENT.is_valid(frame) is valid


def models(kind: type[BaseModel]) -> st.SearchStrategy[BaseModel]:
    """Make models with any values that their types allow, optional keys left out at times."""
    keys = {
        name: st.none() | st.dictionaries(st.text(), JSON, max_size=2)
        if field.annotation == dict[str, Any] | None
        else st.from_type(field.annotation)  # type: ignore[arg-type]
        for name, field in kind.model_fields.items()
    }
    return st.builds(kind, **keys)


JSON = st.recursive(st.booleans() | st.integers() | st.text(), st.lists, max_leaves=3)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
blocks = st.builds(Text, st.text()) | st.builds(Thinking, st.text(), st.text())
st.register_type_strategy(
    Message,
    st.builds(
        Message,
        st.sampled_from(get_args(Role)),
        st.text() | st.lists(blocks, max_size=3),
        st.none() | st.text(),
        id=st.text(),
        model=st.none() | st.text(),
        usage=st.none() | st.builds(Usage, st.integers(0), estimated=st.booleans()),
        began=st.none() | st.floats(0, 1e10),
        ended=st.none() | st.floats(0, 1e10),
    ),
)
for nested in {
    field
    for frame in SERVER_FRAMES.values()
    for annotation in frame.model_fields.values()
    for field in (annotation.annotation, *getattr(annotation.annotation, "__args__", ()))
    if isinstance(field, type) and issubclass(field, BaseModel)
}:
    st.register_type_strategy(nested, models(nested))


@given(st.one_of([models(kind) for kind in SERVER_FRAMES.values()]))
def test_server_frames_are_valid_without_null(frame: ServerFrame) -> None:
    encoded = json.loads(encode(frame))
    OF_SERVER.validate(encoded)
    of(type(frame).__name__).validate(encoded)
    assert None not in {value for node in nodes(encoded) for value in map(repr, node.values())}


@pytest.mark.parametrize("name", SERVER_FRAMES)
def test_server_frame_needs_required_keys_and_may_have_more(name: str) -> None:
    definition = json_schema()["$defs"][SERVER_FRAMES[name].__name__]
    required = {k for k, field in SERVER_FRAMES[name].model_fields.items() if field.is_required()}
    always = required | ({"protocol"} if name == "hello" else set())
    assert set(definition["required"]) == {"type", *always}
    assert "additionalProperties" not in definition
    assert not any(node.get("type") == "null" for node in nodes(definition))
    later = {"type": name, **dict.fromkeys(required), "from_later": {"x": None}}
    problems = list(of(SERVER_FRAMES[name].__name__).iter_errors(later))
    assert {error.path[0] for error in problems if error.path} == required
    del later["type"]
    assert any(
        error.validator == "required"
        for error in of(SERVER_FRAMES[name].__name__).iter_errors(later)
    )


def test_unknown_codes_and_reasons_are_valid() -> None:
    OF_SERVER.validate(
        {"type": "error", "code": "new", "message": "m", "retryable": True, "ref": "r"}
    )
    usage = {"input_tokens": 1, "output_tokens": 1, "seconds": 2}
    OF_SERVER.validate(
        {"type": "done", "id": ID, "seq": 0, "reason": "stopped", "by": "moon", "usage": usage}
    )


@pytest.mark.slow
def test_asyncapi_document_follows_specification() -> None:
    document = asyncapi()
    package = require_npm_package("@asyncapi/specs")
    specification = json.loads((package / "schemas/3.0.0.json").read_text())
    Draft7Validator(specification).validate(document)
    assert list(Draft7Validator(specification).iter_errors({**document, "servers": []}))


def test_asyncapi_document_references_every_frame_only() -> None:
    document = asyncapi()
    assert document["components"]["messages"].keys() == {**CLIENT_FRAMES, **SERVER_FRAMES}.keys()
    for node in nodes(document):
        if (reference := node.get("$ref")) is not None:
            found: Any = document
            for part in reference.removeprefix("#/").split("/"):
                found = found[part]
    received = {
        o["messages"][0]["$ref"].rpartition("/")[2]
        for o in document["operations"].values()
        if o["action"] == "receive"
    }
    assert received == CLIENT_FRAMES.keys()
    for schema in document["components"]["schemas"].values():
        Draft7Validator.check_schema(schema)
