"""TypeScript's types of the frames, written from the JSON Schema of the protocol."""

import json
from typing import Any

from wsserver.schema import json_schema

HEAD = """\
// The frames of the protocol, of clients and of the server. PROTOCOL.md says what they mean.
// `UPDATE_DOCS=1 pytest tests/test_docs.py` writes this file from the JSON Schema.

import type { AnyBlock, Block } from './blocks.js'
"""


def declarations() -> str:
    """Return the file ``frames.d.ts``."""
    types = json_schema()["$defs"]
    unions = {"ClientFrame": types.pop("client"), "ServerFrame": types.pop("server")}
    types["Usage"] = types["Done"]["properties"]["usage"]
    text = [HEAD]
    for name, schema in unions.items():
        text.append(f"{comment(schema)}export type {name} = {union(schema['anyOf'])}\n")
    client = {reference(option) for option in unions["ClientFrame"]["anyOf"]}
    for name, schema in types.items():
        shown = NAMES.get(name, name)
        if "properties" in schema:
            body = members(schema, blocks="AnyBlock" if name in client else "Block")
            text.append(f"{comment(schema)}export interface {shown} {body}\n")
        else:
            text.append(f"{comment(schema)}export type {shown} = {written(schema)}\n")
    return "\n".join(text)


# The names of Python's classes that say too little in a program with other types.
NAMES = {
    "BlockFrame": "BlockPart",
    "Code": "ErrorCode",
    "Error": "ErrorFrame",
    "ThinkingFrame": "Thinking",
}


def reference(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def written(schema: dict[str, Any], blocks: str = "Block", indent: str = "") -> str:
    """Return the type of a schema."""
    if "anyOf" in schema:
        return union(schema["anyOf"], blocks, indent)
    if schema.get("type") == "array":
        item = written(schema["items"], blocks, indent)
        return f"({item})[]" if " | " in item else f"{item}[]"
    if schema.get("type") == "object":
        return written_object(schema, blocks, indent)
    if "$ref" in schema:
        name = reference(schema)
        return NAMES.get(name, name)
    if values := [schema["const"]] if "const" in schema else schema.get("enum"):
        return " | ".join(map(literal, values))
    return SCALARS[schema["type"]]


SCALARS = {"boolean": "boolean", "integer": "number", "number": "number", "string": "string"}


def written_object(schema: dict[str, Any], blocks: str, indent: str) -> str:
    keys = schema.get("properties")
    if not keys:
        return "Record<string, unknown>"
    if [*keys] == ["type"]:
        return blocks
    return "Usage" if "input_tokens" in keys else members(schema, blocks, indent)


def union(options: list[dict[str, Any]], blocks: str = "Block", indent: str = "") -> str:
    """Return a union without ``null``; a text beside known texts stays open for others."""
    found = [written(option, blocks, indent) for option in options if option.get("type") != "null"]
    if len(found) > 1 and all(name == "string" or name[0] == "'" for name in found):
        found = ["(string & {})" if name == "string" else name for name in found]
    return " | ".join(found)


def members(schema: dict[str, Any], blocks: str = "Block", indent: str = "") -> str:
    lines = ["{"]
    required = schema.get("required", ())
    for key, value in schema["properties"].items():
        mark = "" if key in required else "?"
        lines.append(f"{indent}  {key}{mark}: {written(value, blocks, indent + '  ')}")
    return "\n".join([*lines, f"{indent}}}"])


def literal(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


def comment(schema: dict[str, Any]) -> str:
    text = schema.get("description", "")
    if not text:
        return ""
    lines = text.splitlines()
    if len(lines) == 1:
        return f"/** {text} */\n"
    return "\n".join(["/**", *(f" * {line}".rstrip() for line in lines), " */\n"])
