"""The frames of the protocol as JSON Schema, and the protocol as AsyncAPI.

Both are generated from the models in :mod:`wsserver.protocol`. The schema of a client's frame
accepts what :func:`wsserver.parsing.parse` accepts, as far as JSON Schema can tell. The schema of a
server's frame requires the keys that are always there and allows others, since a later server may
add keys.
"""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from wsserver.errors import Code
from wsserver.protocol import ANSWERS, CLIENT_FRAMES, SERVER_FRAMES, SUBPROTOCOL

CLIENT = (
    "A frame that a client may send. JSON Schema cannot express these rules: the last message has "
    "the role user; no text has half of a surrogate pair; no object has a key twice; an integer "
    "has no fraction, not even `.0`; a frame is within the limits of the server. The server also "
    "accepts unknown keys whose value is null."
)
SERVER = (
    "A frame that the server may send. A client ignores unknown types and keys, because a later "
    "server may add some."
)
PROMPT_OR_MESSAGES = [
    {
        "required": ["prompt"],
        "properties": {
            "prompt": {"type": ["string", "array"]},
            "messages": {"type": "null"},
        },
    },
    {
        "required": ["messages"],
        "properties": {
            "messages": {"type": "array", "minItems": 1},
            "prompt": {"type": "null"},
            "conversation": {"type": "null"},
            "retry_of": {"type": "null"},
        },
    },
]


class _Generator(GenerateJsonSchema):
    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False  # "On Busy" tells no more than "on_busy"


class _Client(_Generator):
    """Schemas of client frames. An optional key may be ``null``, which counts as left out."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        value = {"anyOf": [self.generate_inner(schema["schema"]), {"type": "null"}]}
        default = schema["default"]
        return value if default is None else {**value, "default": default}

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        value = super().model_schema(schema)
        frame_type = value["properties"].get("type")
        if frame_type is not None and frame_type["default"] == "prompt":
            value["oneOf"] = PROMPT_OR_MESSAGES
        elif frame_type is not None:
            value["properties"]["type"] = {"const": frame_type["default"]}
            value["required"] = ["type", *value.get("required", ())]
        return value


class _Server(_Generator):
    """Schemas of server frames. Later servers may send more keys, and more values of enums."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_is_required(self, field: Any, total: bool) -> bool:  # noqa: ARG002, FBT001
        schema = field["schema"]
        return bool(schema["type"] != "default" or schema["default"] is not None)

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        value = super().model_schema(schema)
        del value["additionalProperties"]
        return value

    def literal_schema(self, schema: core_schema.LiteralSchema) -> JsonSchemaValue:
        value = super().literal_schema(schema)
        return {"anyOf": [value, {"type": "string"}]} if "enum" in value else value

    def enum_schema(self, schema: core_schema.EnumSchema) -> JsonSchemaValue:
        assert schema["cls"] is Code
        known = [{"const": code.value, "description": code.meaning} for code in Code]
        return {"anyOf": [*known, {"type": "string", "description": "A code of a later server."}]}


def _definitions(reference: str) -> dict[str, Any]:
    """Return the schemas of all frames, and of what is in them, by the name of the model."""
    found: dict[str, Any] = {}
    for models, generator in ((CLIENT_FRAMES.values(), _Client), (SERVER_FRAMES.values(), _Server)):
        _, schema = models_json_schema(
            [(model, "validation") for model in models],
            schema_generator=generator,
            ref_template=reference,
        )
        assert found.keys().isdisjoint(schema["$defs"])
        found |= schema["$defs"]
    # Docstrings are reStructuredText, descriptions Markdown.
    markdown: dict[str, Any] = json.loads(json.dumps(found).replace("``", "`"))
    return markdown


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema (2020-12) of all frames; ``client`` and ``server`` are of one side."""
    reference = "#/$defs/{model}"
    sides = {
        "client": {"description": CLIENT, "anyOf": _references(CLIENT_FRAMES, reference)},
        "server": {"description": SERVER, "anyOf": _references(SERVER_FRAMES, reference)},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SUBPROTOCOL,
        "anyOf": [{"$ref": f"#/$defs/{side}"} for side in sides],
        "$defs": _definitions(reference) | sides,
    }


def _references(frames: dict[str, Any], reference: str) -> list[dict[str, str]]:
    return [{"$ref": reference.format(model=model.__name__)} for model in frames.values()]


def asyncapi() -> dict[str, Any]:
    """Return an AsyncAPI 3.0 document: the frames that the server receives and sends.

    A Schema Object of AsyncAPI is JSON Schema draft 7. The schemas of the frames use no later
    keyword.
    """
    reference = "#/components/schemas/{model}"
    frames = {**CLIENT_FRAMES, **SERVER_FRAMES}
    channel = {"$ref": "#/channels/socket"}
    messages = {
        name: {
            "name": name,
            "title": model.__name__,
            "summary": (model.__doc__ or "").partition("\n")[0].replace("``", "`"),
            "contentType": "application/json",
            "payload": {"$ref": reference.format(model=model.__name__)},
        }
        | (
            {"correlationId": {"location": "$message.payload#/request"}}
            if "request" in model.model_fields
            else {}
        )
        for name, model in frames.items()
    }

    def of_channel(*names: str) -> list[dict[str, str]]:
        return [{"$ref": f"#/channels/socket/messages/{name}"} for name in names]

    received = {
        f"receive{name.title()}": {
            "action": "receive",
            "channel": channel,
            "messages": of_channel(name),
            "reply": {"channel": channel, "messages": of_channel(ANSWERS[name], "error")},
        }
        for name in CLIENT_FRAMES
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "wsserver",
            "version": SUBPROTOCOL.rpartition("v")[2],
            "description": f"{CLIENT}\n\n{SERVER}\n\nPROTOCOL.md defines the frames.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "local": {
                "host": "localhost:3001",
                "protocol": "ws",
                "description": "The default address of `wsserver serve`.",
            }
        },
        "channels": {
            "socket": {
                "address": "/ws",
                "description": f"One WebSocket; its subprotocol is {SUBPROTOCOL}.",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
                "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
            }
        },
        "operations": received
        | {
            "send": {
                "action": "send",
                "channel": channel,
                "messages": of_channel(*SERVER_FRAMES),
            }
        },
        "components": {"messages": messages, "schemas": _definitions(reference)},
    }
