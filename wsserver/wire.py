"""The values in frames: how pydantic validates, encodes and describes ids, texts and content."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema

from wsserver.content import Block, Message, Text, Usage, dump_content, parse_content

T = TypeVar("T")

ID_PATTERN = r"^[A-Za-z0-9_-]{16,64}$"

REQUEST_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"

BLOCK = {
    "type": "object",
    "description": "A content block of the Messages API, such as `text`, `image` or `document`.",
    "properties": {"type": {"type": "string", "minLength": 1, "maxLength": 64}},
    "required": ["type"],
}
CONTENT = {
    "anyOf": [
        {"type": "string", "pattern": r"\S"},
        {"type": "array", "minItems": 1, "items": BLOCK},
    ]
}
PROMPT_MESSAGE = {
    "type": "object",
    "description": "One message of a history that the client keeps itself.",
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": CONTENT},
    "required": ["role", "content"],
    "additionalProperties": False,
}
USAGE: dict[str, Any] = {
    "type": "object",
    "description": (
        "Tokens spent. The counts of the cache are left out if 0, and `estimated` if false."
    ),
    "properties": {
        "input_tokens": {"type": "integer"},
        "output_tokens": {"type": "integer"},
        "cache_creation_input_tokens": {"type": "integer"},
        "cache_read_input_tokens": {"type": "integer"},
        "estimated": {"const": True},
    },
    "required": ["input_tokens", "output_tokens"],
}
HISTORY_MESSAGE = {
    "type": "object",
    "description": (
        "A message of a conversation; `id` is the generation to which the message belongs. "
        "`partial` is the reason why a reply is incomplete; `cut` if it does not fit into a frame. "
        "`content` is the text. `blocks` has all content; left out if it is a single text block. "
        "Times are in seconds since 1970. `thought`: seconds that the model thought."
    ),
    "properties": {
        "role": {"anyOf": [{"enum": ["user", "assistant"]}, {"type": "string"}]},
        "content": {"type": "string"},
        "id": {"type": "string"},
        "partial": {"type": "string"},
        "blocks": {"type": "array", "items": BLOCK},
        "model": {"type": "string"},
        "usage": USAGE,
        "began": {"type": "number"},
        "ended": {"type": "number"},
        "thought": {"type": "number"},
    },
    "required": ["role", "content", "id"],
}


def _well_formed(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair") from None
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("empty")
    return value


def _content(value: object) -> tuple[Block, ...]:
    blocks = value if isinstance(value, tuple) else parse_content(value)
    for place, block in enumerate(blocks):
        if isinstance(block, Text) and not block.text.strip():
            raise ValueError("empty" if isinstance(value, str) else f"{place}.text: empty")
    if not blocks:
        raise ValueError("empty")
    return blocks


def _prompt_message(value: object) -> Message:
    if isinstance(value, Message):
        return Message(value.role, _content(value.blocks))
    if not isinstance(value, dict):
        raise ValueError("must be an object with `role` and `content`")  # noqa: TRY004 - pydantic
    for key in ("role", "content"):
        if value.get(key) is None:
            raise ValueError(f"{key}: missing")
    for key, item in value.items():
        if key not in {"role", "content"} and item is not None:
            raise ValueError(f"{ascii(key[:40])[1:-1]}: no such key")
    if value["role"] not in ("user", "assistant"):
        raise ValueError("role: must be 'user' or 'assistant'")
    try:
        return Message(value["role"], _content(value["content"]))
    except ValueError as error:
        within = str(error)[0].isdigit()  # the error names a block
        raise ValueError(f"content{'.' if within else ': '}{error}") from None


def _dump_prompt_message(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": dump_content(message.blocks)}


def parse_message(value: Mapping[str, Any]) -> Message:
    """Parse a message of a ``history`` frame. Unknown keys are ignored.

    Raises:
        KeyError, TypeError, ValueError: the message violates the protocol.
    """
    role, text = value["role"], text_of(value["content"])
    if role not in {"user", "assistant"}:
        raise ValueError("a role is neither `user` nor `assistant`")
    blocks = value.get("blocks")
    return Message(
        role,
        text if blocks is None else parse_content(blocks),
        optional(text_of, value.get("partial")),
        id=text_of(value["id"]),
        model=optional(text_of, value.get("model")),
        usage=optional(parse_usage, value.get("usage")),
        began=optional(float, value.get("began")),
        ended=optional(float, value.get("ended")),
        thought=optional(float, value.get("thought")),
    )


def parse_usage(usage: Mapping[str, Any]) -> Usage:
    """Parse the ``usage`` of a frame. Unknown keys are ignored."""
    return Usage(**{key: usage[key] for key in Usage.__slots__ if key in usage})


def _usage(value: Any) -> Usage:
    try:
        return value if isinstance(value, Usage) else parse_usage(value)
    except TypeError as error:
        raise ValueError(str(error)) from None


def optional(parse: Callable[[Any], T], value: object) -> T | None:
    """Parse a value that may be None."""
    return None if value is None else parse(value)


def text_of(value: object) -> str:
    """Return a value that has to be a text.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, str):
        raise TypeError("a value is not a string")
    return value


def _history_message(value: Any) -> Message:
    return value if isinstance(value, Message) else parse_message(value)


def dump_usage(usage: Usage) -> dict[str, Any]:
    """Return usage as a frame has it: without the counts of the cache where they are 0."""
    counts = {key: getattr(usage, key) for key in USAGE["properties"]}
    return {key: count for key, count in counts.items() if count or key in USAGE["required"]}


def _dump_history_message(message: Message) -> dict[str, Any]:
    content = dump_content(message.blocks)
    return _without_none(
        {
            "role": message.role,
            "content": message.text,
            "id": message.id,
            "partial": message.partial,
            "blocks": None if isinstance(content, str) else content,
            "model": message.model,
            "usage": None if message.usage is None else dump_usage(message.usage),
            "began": message.began,
            "ended": message.ended,
            "thought": message.thought,
        }
    )


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


Content = Annotated[
    str | tuple[Block, ...],  # a text is given; once it is validated, there are blocks
    PlainValidator(_content),
    PlainSerializer(dump_content),
    WithJsonSchema(CONTENT),
]
PromptMessage = Annotated[
    Message,
    PlainValidator(_prompt_message),
    PlainSerializer(_dump_prompt_message),
    WithJsonSchema(PROMPT_MESSAGE),
]
FrameUsage = Annotated[
    Usage, PlainValidator(_usage), PlainSerializer(dump_usage), WithJsonSchema(USAGE)
]
HistoryMessage = Annotated[
    Message,
    PlainValidator(_history_message),
    PlainSerializer(_dump_history_message),
    WithJsonSchema(HISTORY_MESSAGE),
]

Id = Annotated[str, Field(pattern=ID_PATTERN)]
RequestId = Annotated[str, Field(pattern=REQUEST_PATTERN)]
WellFormed = Annotated[str, AfterValidator(_well_formed)]
NonBlank = Annotated[
    WellFormed, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})
]
