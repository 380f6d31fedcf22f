"""Messages and their content blocks, in the shapes of the Messages API.

The protocol, the stores, the models and the clients use these types. A block is parsed from the
API's JSON and dumped to it. Nothing is lost: a key without a field is kept in ``extra``, and a
block of an unknown type is an :class:`Other`. A key whose value is ``null`` counts as left out.

The blocks: https://platform.claude.com/docs/en/api/messages
"""

import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic_core import to_json

__all__ = [
    "Block",
    "Document",
    "Image",
    "Message",
    "Other",
    "RedactedThinking",
    "Role",
    "Text",
    "Thinking",
    "ToolResult",
    "ToolUse",
    "Usage",
    "dump_block",
    "dump_content",
    "memory_of",
    "parse_block",
    "parse_content",
    "text_of_block",
]

Role = Literal["user", "assistant"]

DEPTH = 48  # nested objects and lists of a block; the frame around the block adds some
TYPE_LENGTH = 64  # characters of a type
PLAIN = 128  # bytes of a text block in memory besides its text
KEY_SHOWN = 40  # characters of a key in an error

_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "thinking_tokens",
)


@dataclass(frozen=True, slots=True)
class Usage:
    """All tokens spent on a reply so far.

    ``input_tokens`` does not include tokens that were read from or written to a prompt cache; the
    whole input is the sum of the three counts. ``thinking_tokens`` is the part of ``output_tokens``
    that was spent on thinking. It is set if the model shows less thinking than it bills.
    ``estimated``: the model did not report the counts, and the server estimated them.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    estimated: bool = False
    thinking_tokens: int = 0

    def __post_init__(self) -> None:
        # Fail here, and not later, if a model passes a count that is not an integer.
        for name in _COUNTS:
            count = getattr(self, name)
            if type(count) is not int or count < 0:
                object.__setattr__(self, name, max(0, operator.index(count)))

    def but(self, **counts: int | bool) -> "Usage":
        """Return a copy with other counts."""
        return replace(self, **counts)  # type: ignore[arg-type]

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum, which is an estimate if one of both is."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return Usage(**sums, estimated=self.estimated or other.estimated)


_NO_EXTRA: Mapping[str, Any] = MappingProxyType({})


def _no_extra() -> Mapping[str, Any]:
    return _NO_EXTRA  # one for all blocks, as nearly none has an extra key


@dataclass(frozen=True, slots=True)
class Text:
    """Text. Citations of the text are in ``extra``."""

    type: ClassVar[str] = "text"
    fields: ClassVar[dict[str, Any]] = {"text": str}

    text: str
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


@dataclass(frozen=True, slots=True)
class Thinking:
    """Extended thinking. The API accepts it back only with its ``signature``."""

    type: ClassVar[str] = "thinking"
    fields: ClassVar[dict[str, Any]] = {"thinking": str, "signature": str}

    thinking: str
    signature: str = ""
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


@dataclass(frozen=True, slots=True)
class RedactedThinking:
    """Extended thinking that only the API can read."""

    type: ClassVar[str] = "redacted_thinking"
    fields: ClassVar[dict[str, Any]] = {"data": str}

    data: str
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A call of a tool, with its ``input``."""

    type: ClassVar[str] = "tool_use"
    fields: ClassVar[dict[str, Any]] = {"id": str, "name": str, "input": dict}

    id: str
    name: str
    input: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of a tool: text, or blocks as JSON objects."""

    type: ClassVar[str] = "tool_result"
    fields: ClassVar[dict[str, Any]] = {
        "tool_use_id": str,
        "content": (str, list),
        "is_error": bool,
    }

    tool_use_id: str
    content: str | list[Any] = ""
    is_error: bool = False
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


@dataclass(frozen=True, slots=True)
class Image:
    """An image. ``source`` has the ``type`` ``base64``, ``url`` or ``file``."""

    type: ClassVar[str] = "image"
    fields: ClassVar[dict[str, Any]] = {"source": dict}

    source: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


@dataclass(frozen=True, slots=True)
class Document:
    """A PDF or a text. ``source`` has the ``type`` ``base64``, ``text``, ``content`` or ``url``."""

    type: ClassVar[str] = "document"
    fields: ClassVar[dict[str, Any]] = {"source": dict}

    source: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


@dataclass(frozen=True, slots=True)
class Other:
    """A block of a type that this module does not know."""

    fields: ClassVar[dict[str, Any]] = {}

    type: str
    extra: Mapping[str, Any] = field(default_factory=_no_extra)


Block = Text | Thinking | RedactedThinking | ToolUse | ToolResult | Image | Document | Other

_KNOWN: dict[str, Any] = {
    known.type: known
    for known in (Text, Thinking, RedactedThinking, ToolUse, ToolResult, Image, Document)
}
_OPTIONAL: dict[str, object] = {"signature": "", "content": "", "is_error": False}  # the defaults
_NAMES = {str: "a text", dict: "an object", bool: "true or false", (str, list): "a text or a list"}


@dataclass(frozen=True, slots=True, init=False)
class Message:
    """One message of a conversation.

    Args:
        role: who says it.
        blocks: the content. A ``str`` stands for one :class:`Text`, an empty one for no block.
        partial: why the message is incomplete: the cause of a stop, or the code of an error.
        id: the id of the generation to which the message belongs.
        model: the model that replied.
        usage: the tokens spent on a reply.
        began: when the message was accepted, in seconds since 1970.
        ended: when the reply ended, in seconds since 1970.
        thought: seconds that the model thought; None without thinking.
    """

    role: Role
    blocks: tuple[Block, ...]
    partial: str | None
    id: str | None
    model: str | None
    usage: Usage | None
    began: float | None
    ended: float | None
    thought: float | None

    def __init__(
        self,
        role: Role,
        blocks: str | Iterable[Block],
        partial: str | None = None,
        *,
        id: str | None = None,  # noqa: A002
        model: str | None = None,
        usage: Usage | None = None,
        began: float | None = None,
        ended: float | None = None,
        thought: float | None = None,
    ) -> None:
        if isinstance(blocks, str):
            blocks = (Text(blocks),) if blocks else ()
        put = object.__setattr__
        put(self, "role", role)
        put(self, "blocks", tuple(blocks))
        put(self, "partial", partial)
        put(self, "id", id)
        put(self, "model", model)
        put(self, "usage", usage)
        put(self, "began", began)
        put(self, "ended", ended)
        put(self, "thought", thought)

    @property
    def text(self) -> str:
        """The text of the message, without its other blocks."""
        if len(self.blocks) == 1 and isinstance(block := self.blocks[0], Text):  # the common case
            return block.text
        return "".join(block.text for block in self.blocks if isinstance(block, Text))

    @property
    def content(self) -> str:
        """The same as :attr:`text`, under the name that a frame has for it."""
        return self.text

    @property
    def thinking(self) -> str:
        """The thinking of the message."""
        return "".join(block.thinking for block in self.blocks if isinstance(block, Thinking))

    @property
    def size(self) -> int:
        """Characters of the message without its thinking; see :func:`text_of_block`."""
        if len(self.blocks) == 1 and isinstance(block := self.blocks[0], Text):  # the common case
            return len(text_of_block(block))
        return sum(
            len(text_of_block(block))
            for block in self.blocks
            if not isinstance(block, Thinking | RedactedThinking)
        )


def parse_content(value: object) -> tuple[Block, ...]:
    """Parse the content of a message: a text, or a list of blocks.

    Raises:
        ValueError: ``value`` is neither. The error names the key, as in ``1.source: missing``.
    """
    if isinstance(value, str):
        _check(value)
        return (Text(value),) if value else ()
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of blocks")  # noqa: TRY004 - as its values
    blocks = []
    for place, item in enumerate(value):
        try:
            blocks.append(parse_block(item))
        except ValueError as error:
            raise ValueError(f"{place}.{error}") from None
    return tuple(blocks)


def dump_content(blocks: Iterable[Block]) -> str | list[dict[str, Any]]:
    """Return the JSON value of content: a text for a single text block, else a list of blocks."""
    found = tuple(blocks)
    if not found:
        return ""
    if len(found) == 1 and isinstance(found[0], Text) and not found[0].extra:
        return found[0].text
    return [dump_block(block) for block in found]


def parse_block(value: object) -> Block:
    """Parse one block.

    Raises:
        ValueError: ``value`` is not a block. The error names the key.
    """
    if not isinstance(value, dict):
        raise ValueError("type: a block is an object with a type")  # noqa: TRY004 - as its values
    name = value.get("type")
    if not isinstance(name, str) or not 0 < len(name) <= TYPE_LENGTH:
        raise ValueError("type: missing" if name is None else "type: is not one of a block")
    known = _KNOWN.get(name)
    fields: dict[str, Any] = {} if known is None else known.fields
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, item in value.items():
        if key == "type" or item is None:
            continue
        try:
            _check(key)
            _check(item)
        except ValueError as error:
            raise ValueError(f"{ascii(key[:KEY_SHOWN])[1:-1]}: {error}") from None
        wanted = fields.get(key)
        if wanted is not None and not isinstance(item, wanted):
            raise ValueError(f"{key}: must be {_NAMES[wanted]}")
        (extra if wanted is None else found)[key] = item
    for key in fields:
        if key not in found and key not in _OPTIONAL:
            raise ValueError(f"{key}: missing")
    if known is None:
        return Other(name, extra or _NO_EXTRA)
    block: Block = known(**found, extra=extra or _NO_EXTRA)
    return block


def dump_block(block: Block) -> dict[str, Any]:
    """Return a block as the API's JSON object."""
    found: dict[str, Any] = {"type": block.type}
    for key in block.fields:
        value = getattr(block, key)
        if key not in _OPTIONAL or value != _OPTIONAL[key]:
            found[key] = value
    return {**found, **block.extra}


def text_of_block(block: Block) -> str:
    """Return the text of a text block, or the JSON of any other block, to measure its length."""
    if isinstance(block, Text) and not block.extra:
        return block.text
    return compact(dump_block(block))


def compact(value: object) -> str:
    """Return a JSON value as JSON without spaces.

    Raises:
        ValueError: UTF-8 cannot encode a text of it.
    """
    return to_json(value).decode()


def memory_of(message: Message) -> int:
    """Return the bytes of memory of the blocks of a message."""
    size = 0
    for block in message.blocks:
        if isinstance(block, Text) and not block.extra:  # nearly all blocks
            size += PLAIN + sys.getsizeof(block.text)
        else:
            size += _memory_of(dump_block(block))
    return size


def _memory_of(value: object) -> int:
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(_memory_of(item) for item in value.values())
    if isinstance(value, list):
        return size + sum(map(_memory_of, value))
    return size


def _check(value: object, depth: int = DEPTH) -> None:
    """Check that UTF-8 can carry all texts of a JSON value, and that it is not nested too deeply.

    Raises:
        ValueError: a text has half of a surrogate pair, or the value is nested too deeply.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("has half of a surrogate pair") from None
    elif isinstance(value, dict | list):
        if not depth:
            raise ValueError("nested too deeply")
        if isinstance(value, dict):
            for key in value:
                _check(key, depth - 1)
            value = list(value.values())
        for item in value:
            _check(item, depth - 1)
