"""The frames for machines: as JSON Schema 2020-12, and the protocol as AsyncAPI 3.0.

https://json-schema.org/draft/2020-12/schema, https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from wsserver.protocol import CLIENT_FRAMES, SERVER_FRAMES, SUBPROTOCOL, Prompt

__all__ = ["asyncapi", "json_schema"]

# What a `prompt` has besides what its keys alone say. A key that is null counts as left out.
_PROMPT_RULES = {
    "oneOf": [
        {"required": [key], "properties": {key: {"not": {"type": "null"}}}}
        for key in ("prompt", "messages")
    ],
    "if": {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
    "then": {"properties": {"conversation": {"type": "null"}, "retry_of": {"type": "null"}}},
}

# The frames that answer a frame of the client, or `error`.
_ANSWERS = {
    "prompt": ("start",),
    "stop": ("stopped",),
    "resume": ("start",),
    "open": ("history",),
    "list": ("conversations",),
    "rename": ("renamed",),
    "delete": ("deleted",),
    "close": ("closed",),
    "auth": ("authenticated",),
    "ping": ("pong",),
}


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema of all frames, those of each side under ``client`` and ``server``."""
    definitions, client, server = _definitions("#/$defs/")
    definitions["client"] = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in client.values()]}
    definitions["server"] = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in server.values()]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SUBPROTOCOL,
        "anyOf": [{"$ref": "#/$defs/client"}, {"$ref": "#/$defs/server"}],
        "$defs": definitions,
    }


def asyncapi() -> dict[str, Any]:
    """Return the protocol as an AsyncAPI document, from the server's point of view."""
    definitions, client, server = _definitions("#/components/schemas/")
    frames = {
        model.model_fields["type"].default: model
        for model in (*CLIENT_FRAMES.values(), *SERVER_FRAMES)
    }
    messages = {
        kind: {
            "name": kind,
            "summary": inspect.cleandoc(frames[kind].__doc__ or "").partition("\n")[0],
            "payload": {"$ref": f"#/components/schemas/{name}"},
        }
        for kind, name in (client | server).items()
    }
    channel = {"$ref": "#/channels/chat"}
    operations: dict[str, Any] = {
        f"receive_{kind}": {
            "action": "receive",
            "channel": channel,
            "messages": list(_messages(kind)),
            "reply": {"channel": channel, "messages": list(_messages(*_ANSWERS[kind], "error"))},
        }
        for kind in client
    }
    operations["send"] = {
        "action": "send",
        "channel": channel,
        "messages": list(_messages(*server)),
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": SUBPROTOCOL,
            "version": "1.0.0",
            "description": "Chat with a language model: see PROTOCOL.md of wsserver.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {"local": {"host": "localhost:3001", "protocol": "ws"}},
        "channels": {
            "chat": {
                "address": "/ws",
                "messages": {kind: {"$ref": f"#/components/messages/{kind}"} for kind in messages},
                "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
            }
        },
        "operations": operations,
        "components": {"messages": messages, "schemas": definitions},
    }


def _messages(*kinds: str) -> Iterator[dict[str, str]]:
    for kind in kinds:
        yield {"$ref": f"#/channels/chat/messages/{kind}"}


def _definitions(at: str) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return the definitions of all frames, and by type the names of each side's."""
    client = _side(list(CLIENT_FRAMES.values()), at)
    server = _side(list(SERVER_FRAMES), at)
    for name, definition in client[0].items():
        if "type" in definition.get("properties", {}) and name != Prompt.__name__:
            definition["required"] = ["type", *definition.get("required", ())]
    client[0][Prompt.__name__] |= _PROMPT_RULES
    for definition in server[0].values():
        _as_sent(definition)
    return client[0] | server[0], client[1], server[1]


def _side(models: list[type[Any]], at: str) -> tuple[dict[str, Any], dict[str, str]]:
    references, schema = models_json_schema(
        [(model, "validation") for model in models], ref_template=at + "{model}"
    )
    names = {
        model.model_fields["type"].default: references[model, "validation"]["$ref"].rpartition("/")[
            2
        ]
        for model in models
        if issubclass(model, BaseModel)
    }
    definitions: dict[str, Any] = schema["$defs"]
    return definitions, names


def _as_sent(definition: dict[str, Any]) -> None:
    """Have a schema of what the server accepts from itself describe what clients may get.

    A later server may send more keys. A key without a value is left out and never null.
    """
    definition.pop("additionalProperties", None)
    properties = definition.get("properties", {})
    for key, schema in properties.items():
        if "anyOf" in schema:
            kinds = [kind for kind in schema.pop("anyOf") if kind != {"type": "null"}]
            properties[key] = (
                {**schema, **kinds[0]} if len(kinds) == 1 else {**schema, "anyOf": kinds}
            )
            properties[key].pop("default", None)
    if "type" in properties:
        definition["required"] = ["type", *definition.get("required", ())]
