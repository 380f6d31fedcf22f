"""The wire: every frame as a model, parsing what clients send, encoding what they get.

``PROTOCOL.md`` beside this file is the reference; this module is its other half, and
:func:`json_schema` its machine-readable form. Nothing here does I/O.
"""

import json
import re
from enum import IntEnum
from json.encoder import encode_basestring
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from wsserver.errors import Code, Refused
from wsserver.generation import Run, Usage
from wsserver.logs import printable

__all__ = [
    "SUBPROTOCOL",
    "Auth",
    "Authenticated",
    "ClientFrame",
    "Close",
    "ConversationItem",
    "Conversations",
    "Delete",
    "Deleted",
    "Done",
    "Error",
    "History",
    "HistoryMessage",
    "List",
    "Open",
    "Ping",
    "Pong",
    "Prompt",
    "Rename",
    "Renamed",
    "Resume",
    "Start",
    "Stop",
    "StoppedBy",
    "Terminal",
    "Turn",
    "encode",
    "encode_run",
    "json_schema",
    "parse",
]

SUBPROTOCOL = "wsserver.v1"

StoppedBy = Literal["client", "disconnect", "replaced", "timeout", "shutdown"]


def _whole(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair") from None
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("empty")
    return value


ID_PATTERN = r"^[A-Za-z0-9_-]{16,64}$"

Id = Annotated[str, Field(pattern=ID_PATTERN)]
Text = Annotated[str, AfterValidator(_whole)]
NonBlank = Annotated[Text, AfterValidator(_not_blank)]


class Close(IntEnum):
    """The close codes that the server sends, of RFC 6455 section 7.4 and its IANA registry."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    TRY_AGAIN_LATER = 1013


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Client to server.


class Turn(_Frame):
    """One message of a history that the client keeps itself."""

    role: Literal["user", "assistant"]
    content: NonBlank


class Prompt(_Frame):
    """Ask for a reply: ``prompt`` in a conversation, or ``messages`` that stand for themselves."""

    type: Literal["prompt"] = "prompt"
    prompt: NonBlank | None = None
    messages: list[Turn] | None = None
    id: Id | None = None
    conversation: Id | None = None
    on_busy: Literal["reject", "queue", "interrupt"] = "reject"
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    system: NonBlank | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None

    @field_validator("messages")
    @classmethod
    def _ends_with_user(cls, value: list[Turn] | None) -> list[Turn] | None:
        if value is not None and not (value and value[-1].role == "user"):
            raise ValueError("the last message must be the user's")
        return value

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        if self.messages is not None and self.conversation is not None:
            raise ValueError("`messages` is a history of its own and goes with no `conversation`")
        return self

    @property
    def size(self) -> int:
        """Bytes of all text in it, as UTF-8."""
        texts = [self.prompt or "", self.system or ""]
        texts += [turn.content for turn in self.messages or ()]
        return sum(len(text.encode()) for text in texts)


class Stop(_Frame):
    """Stop the generation ``id``; without it, all that this socket follows."""

    type: Literal["stop"] = "stop"
    id: Annotated[str, Field(max_length=64)] | None = None


class Auth(_Frame):
    """Say who the client acts for, for those that can set no headers; again before it expires."""

    type: Literal["auth"] = "auth"
    token: Annotated[Text, Field(min_length=1, max_length=8192, repr=False)]


class Ping(_Frame):
    """A heartbeat that JavaScript can send; answered by ``pong``."""

    type: Literal["ping"] = "ping"


class Resume(_Frame):
    """Follow the generation ``id`` again: all after piece ``after``, then what comes."""

    type: Literal["resume"] = "resume"
    id: Id
    after: Annotated[int, Field(ge=0)] = 0


class Open(_Frame):
    """Get the history of a conversation, and follow what runs in it, now and later.

    With ``before``, only get the part of the history that ends there.
    """

    type: Literal["open"] = "open"
    conversation: Id
    before: Annotated[int, Field(ge=1)] | None = None


class List(_Frame):
    """Get the client's conversations, newest first; ``before`` is the ``next`` of the last page."""

    type: Literal["list"] = "list"
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    before: Annotated[Text, Field(max_length=128)] | None = None


class Rename(_Frame):
    """Give a conversation another title."""

    type: Literal["rename"] = "rename"
    conversation: Id
    title: Annotated[NonBlank, Field(max_length=200)]


class Delete(_Frame):
    """Stop what runs in a conversation, and delete it."""

    type: Literal["delete"] = "delete"
    conversation: Id


ClientFrame = Prompt | Stop | Resume | Open | List | Rename | Delete | Auth | Ping

_CLIENT_FRAMES: dict[str, type[ClientFrame]] = {
    "prompt": Prompt,
    "stop": Stop,
    "resume": Resume,
    "open": Open,
    "list": List,
    "rename": Rename,
    "delete": Delete,
    "auth": Auth,
    "ping": Ping,
}


# Server to client.


class Start(_Frame):
    """The prompt was accepted, or found again. ``queued``: its place, where it must wait.

    ``prompt`` is the user's text, for those who follow what another socket has asked.
    """

    type: Literal["start"] = "start"
    id: str
    conversation: str | None = None
    model: str
    queued: int | None = None
    prompt: str | None = None


class Token(_Frame):
    """Text up to and including piece ``seq``: one piece, or several merged."""

    type: Literal["token"] = "token"
    id: str
    seq: int
    text: str


class ThinkingFrame(_Frame):
    """The same for the model's extended thinking."""

    model_config = ConfigDict(title="Thinking")

    type: Literal["thinking"] = "thinking"
    id: str
    seq: int
    text: str


class UsageCounts(_Frame):
    """Tokens spent. The cache's two are left out where they are 0, ``estimated`` where false."""

    model_config = ConfigDict(title="Usage")

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    estimated: Literal[True] | None = None

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """Put a generation's usage into the form of the wire."""
        return cls(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_creation_input_tokens=usage.cache_creation_input_tokens or None,
            cache_read_input_tokens=usage.cache_read_input_tokens or None,
            estimated=True if usage.estimated else None,
        )


class Done(_Frame):
    """Terminal: the reply is over. ``seq`` is that of its last piece, 0 where it has none."""

    type: Literal["done"] = "done"
    id: str
    seq: int
    reason: str
    by: StoppedBy | None = None
    usage: UsageCounts
    saved: Literal[False] | None = None


class Error(_Frame):
    """With ``id``: terminal for that generation. Without: a client frame was refused.

    ``about`` is then the ``id`` which that frame carried, if any.
    """

    type: Literal["error"] = "error"
    code: Code
    message: str
    id: str | None = None
    seq: int | None = None
    about: str | None = None
    retryable: bool
    retry_after: float | None = None
    usage: UsageCounts | None = None
    saved: Literal[False] | None = None
    ref: str


class Authenticated(_Frame):
    """The answer to ``auth``: for whom, and until when, in seconds since 1970, if it ends."""

    type: Literal["authenticated"] = "authenticated"
    principal: str
    expires: float | None = None


class Pong(_Frame):
    """The answer to ``ping``."""

    type: Literal["pong"] = "pong"


class HistoryMessage(_Frame):
    """A message of a conversation; ``id`` is that of the generation which it belongs to.

    ``partial``: why a reply is not whole. ``cut`` says that it is longer than a frame can hold.
    """

    role: Literal["user", "assistant"]
    content: str
    id: str
    partial: str | None = None


class History(_Frame):
    """The messages of a conversation, oldest first, without what still runs.

    ``before`` is what gets the older ones; it is left out where there are none.
    """

    type: Literal["history"] = "history"
    conversation: str
    title: str
    messages: list[HistoryMessage]
    running: list[str]
    before: int | None = None


class ConversationItem(_Frame):
    """A conversation in a list. Times are in seconds since 1970."""

    id: str
    title: str
    created: float
    updated: float


class Conversations(_Frame):
    """A page of the client's conversations; ``next`` gets the one after it, if there is one."""

    type: Literal["conversations"] = "conversations"
    items: list[ConversationItem]
    next: str | None = None


class Renamed(_Frame):
    """The conversation has another title."""

    type: Literal["renamed"] = "renamed"
    conversation: str
    title: str


class Deleted(_Frame):
    """The conversation is gone."""

    type: Literal["deleted"] = "deleted"
    conversation: str


Terminal = Done | Error
ServerFrame = (
    Start
    | Token
    | ThinkingFrame
    | Done
    | Error
    | History
    | Conversations
    | Renamed
    | Deleted
    | Authenticated
    | Pong
)

_SERVER_FRAMES: tuple[type[ServerFrame], ...] = (
    Start,
    Token,
    ThinkingFrame,
    Done,
    Error,
    History,
    Conversations,
    Renamed,
    Deleted,
    Authenticated,
    Pong,
)


def encode(frame: ServerFrame) -> bytes:
    """Encode a frame as UTF-8 JSON, without the keys that have no value."""
    return frame.model_dump_json(exclude_none=True).encode()


def encode_run(generation: str, run: Run) -> bytes:
    """Encode a ``token`` or ``thinking`` frame, as :func:`encode` would.

    Written by hand, as this is what the server does most: an id needs no escaping, and the C
    function that escapes the text is a tenth of the cost of building and dumping a model.
    """
    kind = "thinking" if run.thinking else "token"
    text = encode_basestring(run.text)
    return f'{{"type":"{kind}","id":"{generation}","seq":{run.seq},"text":{text}}}'.encode()


def parse(text: str) -> ClientFrame:
    """Parse what a client sent.

    Raises:
        Refused: it is not a frame of the protocol; the message says why and names the key.
    """
    value = _load(text)
    if not isinstance(value, dict):
        raise Refused(Code.INVALID_FRAME, 'A frame is a JSON object, such as {"prompt": "Hello"}.')
    try:
        return _validate(value)
    except Refused as refused:
        refused.about = _id_of(value)
        raise


def _validate(value: dict[str, Any]) -> ClientFrame:
    name = value.get("type", "prompt" if "prompt" in value or "messages" in value else None)
    if name is None:
        raise Refused(
            Code.INVALID_FRAME,
            'type: missing. The shortest frame is {"prompt": "Hello"}.',
        )
    model = _CLIENT_FRAMES.get(name) if isinstance(name, str) else None
    if model is None:
        known = ", ".join(_CLIENT_FRAMES)
        raise Refused(Code.UNKNOWN_TYPE, f"type: {_shown(name)} is not one of {known}.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise Refused(Code.INVALID_FRAME, _first(error)) from None


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema (2020-12) of all frames, those of each side under its own name."""
    models = [(model, "validation") for model in (*_CLIENT_FRAMES.values(), *_SERVER_FRAMES)]
    references, schema = models_json_schema(
        models,  # type: ignore[arg-type]
        title=SUBPROTOCOL,
        ref_template="#/$defs/{model}",
    )
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["$defs"]["client"] = {
        "anyOf": [references[model, "validation"] for model in _CLIENT_FRAMES.values()]
    }
    schema["$defs"]["server"] = {
        "anyOf": [references[model, "validation"] for model in _SERVER_FRAMES]
    }
    schema["anyOf"] = [{"$ref": "#/$defs/client"}, {"$ref": "#/$defs/server"}]
    return schema


def _load(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except Refused:
        raise
    except RecursionError:
        raise Refused(Code.INVALID_JSON, "The frame is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise Refused(
            Code.INVALID_JSON,
            f"Not JSON at character {error.pos + 1}. "
            'Send an object such as {"prompt": "Hello"} or {"type": "stop"}.',
        ) from None
    except ValueError:  # a number with more digits than Python reads
        raise Refused(Code.INVALID_JSON, "The frame has a number that is too long.") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Refused(Code.INVALID_FRAME, f"{_shown(twice, quote=False)}: given twice.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise Refused(Code.INVALID_JSON, f"{name} is not JSON.")


def _id_of(value: dict[str, Any]) -> str | None:
    """Return the ``id`` of a frame that is unusable otherwise, if at least that is one."""
    found = value.get("id")
    return found if isinstance(found, str) and re.fullmatch(ID_PATTERN, found) else None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(_shown(part, quote=False) for part in first["loc"])
    what = {
        "extra_forbidden": "no such key",
        "string_pattern_mismatch": "16 to 64 of A-Z, a-z, 0-9, _ and -",
        "string_unicode": "has half of a surrogate pair",
    }.get(first["type"])
    if what is None:
        what = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{where}: {what}." if where else f"{what}."


def _shown(value: object, *, quote: bool = True) -> str:
    """Show what a client sent in a message: short, and whatever it is, safe to encode."""
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= 40 else text[:40] + "…"  # noqa: PLR2004
    text = printable(text)
    return f'"{text}"' if quote else text
