"""The wire: every frame as a model, parsing what clients send, encoding what they get.

``PROTOCOL.md`` beside this file is the reference, and :mod:`wsserver.schema` its machine-readable
form. Nothing here does I/O.
"""

import itertools
import json
import re
import reprlib
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

from wsserver.content import Usage
from wsserver.errors import Code, Refused
from wsserver.logs import printable
from wsserver.pieces import TEXT, Kind, Run

__all__ = [
    "CLIENT_FRAMES",
    "SERVER_FRAMES",
    "SUBPROTOCOL",
    "Auth",
    "Authenticated",
    "ClientFrame",
    "Close",
    "CloseConversation",
    "Closed",
    "ConversationItem",
    "Conversations",
    "Delete",
    "Deleted",
    "Done",
    "Error",
    "Hello",
    "History",
    "HistoryMessage",
    "Limits",
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
    "Stopped",
    "StoppedBy",
    "Terminal",
    "Turn",
    "encode",
    "encode_run",
    "first_request",
    "parse",
    "parts",
]

SUBPROTOCOL = "wsserver.v1"

StoppedBy = Literal["client", "deleted", "disconnect", "replaced", "timeout", "shutdown"]


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

REQUEST_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"

MESSAGES = 1000  # of one prompt: 500 turns, beyond what people say in one conversation
# Brackets, commas and colons of a frame outside of its strings, checked before anything is built of
# it: a value takes up to a hundred times the memory of its text. A message has five of them.
PARTS = 6 * MESSAGES
DEPTH = 64  # brackets within each other; the frames of the protocol have three
KEYS = 32  # of one object; a prompt has twelve
DIGITS = 18  # of an integer: what SQLite and others can hold
LARGEST = 10**18  # what an integer with more digits is read as

_STRINGS = re.compile(r'"[^"]*(?:"|\Z)')
_BRACKET = re.compile(r"[\[\]{}]")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}  # from a bracket to the depth behind it

_FIRST_REQUEST = re.compile(r'\s*{\s*"request"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*[,}]')

Id = Annotated[str, Field(pattern=ID_PATTERN)]
RequestId = Annotated[str, Field(pattern=REQUEST_PATTERN)]
Text = Annotated[str, AfterValidator(_whole)]
NonBlank = Annotated[Text, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})]


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


class _Request(_Frame):
    """A frame of a client. Its answer and its error carry the same ``request``."""

    request: RequestId | None = None


class Turn(_Frame):
    """One message of a history that the client keeps itself."""

    role: Literal["user", "assistant"]
    content: NonBlank


class Prompt(_Request):
    """Ask for a reply: ``prompt`` in a conversation, or ``messages`` that stand for themselves."""

    type: Literal["prompt"] = "prompt"
    prompt: NonBlank | None = None
    messages: Annotated[list[Turn], Field(max_length=MESSAGES, fail_fast=True)] | None = None
    id: Id | None = None
    conversation: Id | None = None
    on_busy: Literal["reject", "queue", "interrupt"] = "reject"
    retry_of: Id | None = None
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
        if self.messages is not None and self.retry_of is not None:
            raise ValueError("`retry_of` names a turn of a conversation and needs `prompt`")
        return self

    @property
    def text(self) -> str:
        """All text in it, joined."""
        said = (turn.content for turn in self.messages or ())
        return "".join((self.system or "", self.prompt or "", *said))

    @property
    def size(self) -> int:
        """Bytes of all text in it, as UTF-8."""
        return len(self.text.encode())


class Stop(_Request):
    """Stop the generation ``id``; without it, all that this socket follows."""

    type: Literal["stop"] = "stop"
    id: Annotated[str, Field(max_length=64)] | None = None


class Auth(_Request):
    """Say who the client acts for, for those that can set no headers; again before it expires."""

    type: Literal["auth"] = "auth"
    token: Annotated[Text, Field(min_length=1, max_length=8192, repr=False)]


class Ping(_Request):
    """A heartbeat that JavaScript can send; answered by ``pong``."""

    type: Literal["ping"] = "ping"


class Resume(_Request):
    """Follow the generation ``id`` again: all after piece ``after``, then what comes."""

    type: Literal["resume"] = "resume"
    id: Id
    after: Annotated[int, Field(ge=0)] = 0


class Open(_Request):
    """Get the history of a conversation, and follow what runs in it, now and later.

    With ``before``, only get the part of the history that ends there.
    """

    type: Literal["open"] = "open"
    conversation: Id
    before: Annotated[int, Field(ge=1)] | None = None


class List(_Request):
    """Get the client's conversations, newest first; ``before`` is the ``next`` of the last page."""

    type: Literal["list"] = "list"
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    before: Annotated[Text, Field(max_length=128)] | None = None


class Rename(_Request):
    """Give a conversation another title."""

    type: Literal["rename"] = "rename"
    conversation: Id
    title: Annotated[NonBlank, Field(max_length=200)]


class Delete(_Request):
    """Stop what runs in a conversation, and delete it."""

    type: Literal["delete"] = "delete"
    conversation: Id


class CloseConversation(_Request):
    """Undo ``open``: follow nothing more in a conversation but what this socket asked for."""

    model_config = ConfigDict(title="Close")

    type: Literal["close"] = "close"
    conversation: Id


ClientFrame = (
    Prompt | Stop | Resume | Open | List | Rename | Delete | CloseConversation | Auth | Ping
)

CLIENT_FRAMES: dict[str, type[ClientFrame]] = {
    "prompt": Prompt,
    "stop": Stop,
    "resume": Resume,
    "open": Open,
    "list": List,
    "rename": Rename,
    "delete": Delete,
    "close": CloseConversation,
    "auth": Auth,
    "ping": Ping,
}


# Server to client.


class _Answer(_Frame):
    """A frame that can answer a client's; ``request`` is then the one of that frame."""

    type: str  # first, so that a person reads it first
    request: str | None = None


class Limits(_Frame):
    """What the server accepts on one socket. Sizes are in bytes of UTF-8.

    ``answer_size`` is the largest frame that the server sends. ``requests`` is the number of
    frames that may wait for an answer.
    """

    message_size: int
    prompt_size: int
    answer_size: int
    frame_rate: float
    frame_burst: int
    bad_frames: int
    requests: int
    generations_per_socket: int
    queue_size: int


class Hello(_Frame):
    """The first frame of a socket whose client offered the subprotocol.

    ``auth``: the client has to send ``auth`` first. ``principal``: who the client acts for
    already.
    """

    type: Literal["hello"] = "hello"
    protocol: Literal["wsserver.v1"] = "wsserver.v1"
    auth: Literal[True] | None = None
    principal: str | None = None
    limits: Limits


class Start(_Answer):
    """The prompt was accepted, or found again. ``queued``: its place, where it must wait.

    The frames that follow begin after piece ``after``, 0 where it is left out. ``prompt`` is the
    user's text and ``retry_of`` the turn that is replaced, for those who follow what another
    socket has asked.
    """

    type: Literal["start"] = "start"
    id: str
    conversation: str | None = None
    model: str
    queued: int | None = None
    after: int | None = None
    prompt: str | None = None
    retry_of: str | None = None


class _Content(_Frame):
    """A part of the reply's content: one piece, or several merged; ``seq`` is that of the last.

    ``block`` is the index of the content block; it is left out where it is 0.
    """

    type: str
    id: str
    seq: int
    block: int | None = None


class Token(_Content):
    """Text up to and including piece ``seq``: one piece, or several merged.

    ``block`` is the index of the text's block in the reply, 0 where it is left out. A frame with a
    ``citation`` has no text: the citation is one of the block's.
    """

    type: Literal["token"] = "token"
    text: str
    citation: dict[str, Any] | None = None


class ThinkingFrame(_Content):
    """The same for the model's extended thinking.

    A frame with a ``signature`` has no text: it has the signature of the block, or a part of it.
    """

    model_config = ConfigDict(title="Thinking")

    type: Literal["thinking"] = "thinking"
    text: str
    signature: str | None = None


class BlockFrame(_Content):
    """A content block of another type, such as ``tool_use``.

    ``partial_json`` is the JSON of the block as a text, or a part of it: the parts of one
    ``block``, one after the other, are the whole.
    """

    model_config = ConfigDict(title="Block")

    type: Literal["block"] = "block"
    partial_json: str


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


class Error(_Answer):
    """With ``id``: terminal for that generation. Without: a client frame was refused.

    ``about`` is then the ``id`` of that frame, or its ``conversation``, if the frame had one.
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


class Authenticated(_Answer):
    """The answer to ``auth``: the principal, and when the token expires, if it does.

    ``expires`` is in seconds since 1970, ``expires_in`` in seconds from now: the clock of the
    client may be wrong.
    """

    type: Literal["authenticated"] = "authenticated"
    principal: str
    expires: float | None = None
    expires_in: float | None = None


class Pong(_Answer):
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


class History(_Answer):
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


class Conversations(_Answer):
    """A page of the client's conversations; ``next`` gets the one after it, if there is one."""

    type: Literal["conversations"] = "conversations"
    items: list[ConversationItem]
    next: str | None = None


class Renamed(_Answer):
    """The conversation has another title."""

    type: Literal["renamed"] = "renamed"
    conversation: str
    title: str


class Deleted(_Answer):
    """The conversation is gone."""

    type: Literal["deleted"] = "deleted"
    conversation: str


class Closed(_Answer):
    """The socket follows the conversation no more."""

    type: Literal["closed"] = "closed"
    conversation: str


class Stopped(_Answer):
    """The answer to a ``stop`` with a ``request``: these generations have ended."""

    type: Literal["stopped"] = "stopped"
    ids: list[str]


Terminal = Done | Error
ServerFrame = (
    Hello
    | Start
    | Token
    | ThinkingFrame
    | BlockFrame
    | Done
    | Error
    | History
    | Conversations
    | Renamed
    | Deleted
    | Closed
    | Stopped
    | Authenticated
    | Pong
)

SERVER_FRAMES: dict[str, type[ServerFrame]] = {
    "hello": Hello,
    "start": Start,
    "token": Token,
    "thinking": ThinkingFrame,
    "block": BlockFrame,
    "done": Done,
    "error": Error,
    "history": History,
    "conversations": Conversations,
    "renamed": Renamed,
    "deleted": Deleted,
    "closed": Closed,
    "stopped": Stopped,
    "authenticated": Authenticated,
    "pong": Pong,
}


# What each kind of piece becomes: the beginning of its frame, and the key of the data.
_FRAMES: dict[Kind, tuple[str, str]] = {
    "text": ('{"type":"token",', "text"),
    "thinking": ('{"type":"thinking",', "text"),
    "signature": ('{"type":"thinking","text":"",', "signature"),
    "citation": ('{"type":"token","text":"",', "citation"),
    "block": ('{"type":"block",', "partial_json"),
}


def encode(frame: ServerFrame) -> bytes:
    """Encode a frame as UTF-8 JSON, without the keys that have no value."""
    return frame.model_dump_json(exclude_none=True).encode()


def encode_run(generation: str, run: Run) -> bytes:
    """Encode the frame of a run, as :func:`encode` would.

    Written by hand, as this is what the server does most: an id needs no escaping, and the C
    function that escapes the text is a tenth of the cost of building and dumping a model.
    """
    seq, kind, block, data = run
    if kind == TEXT and not block:
        text = encode_basestring(data)
        return f'{{"type":"token","id":"{generation}","seq":{seq},"text":{text}}}'.encode()
    head, key = _FRAMES[kind]
    number = f',"block":{block}' if block else ""
    value = data if kind == "citation" else encode_basestring(data)
    return f'{head}"id":"{generation}","seq":{seq}{number},"{key}":{value}}}'.encode()


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
        refused.about = _match(value, ID_PATTERN, "id", "conversation")
        refused.request = _match(value, REQUEST_PATTERN, "request")
        raise


def first_request(message: str) -> str | None:
    """Return the ``request`` of a frame that is not parsed, if that is the frame's first key."""
    found = _FIRST_REQUEST.match(message)
    return None if found is None else found[1]


def _validate(value: dict[str, Any]) -> ClientFrame:
    name = value.get("type", "prompt" if "prompt" in value or "messages" in value else None)
    if name is None:
        raise Refused(
            Code.INVALID_FRAME,
            'type: missing. Without it, give either `prompt` or `messages`: {"prompt": "Hello"}.',
        )
    model = CLIENT_FRAMES.get(name) if isinstance(name, str) else None
    if model is None:
        known = ", ".join(CLIENT_FRAMES)
        raise Refused(Code.UNKNOWN_TYPE, f"type: {_shown(name)} is not one of {known}.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None


def _load(text: str) -> object:
    _check_shape(text)
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        raise Refused(
            Code.INVALID_JSON,
            f"Not JSON at character {error.pos + 1}. "
            'Send an object such as {"prompt": "Hello"} or {"type": "stop"}.',
        ) from None
    except RecursionError:
        raise _too_deep() from None


def _check_shape(text: str) -> None:
    """Refuse a frame of too many parts before anything is built of it.

    Raises:
        Refused: the frame has more parts, or brackets within each other, than it may.
    """
    bare = _without_strings(text)
    if bare.count("[") + bare.count("{") > DEPTH:
        # Each bracket is looked at once. What closes more brackets than there are is not JSON.
        brackets = itertools.islice(_BRACKET.finditer(bare), 2 * PARTS)
        steps = (_STEPS[bracket[0]] for bracket in brackets)
        if max(itertools.accumulate(steps)) > DEPTH:
            raise _too_deep()
    if _count(bare) > PARTS:
        raise Refused(
            Code.TOO_LONG, f"The frame has too many values; `messages` may be {MESSAGES}."
        )


def parts(text: str) -> int:
    """Count the brackets, commas and colons of a frame outside of its strings."""
    return _count(_without_strings(text))


def _count(bare: str) -> int:
    return sum(map(bare.count, ",:[{"))


def _without_strings(text: str) -> str:
    return _STRINGS.sub("", text.replace("\\\\", "").replace('\\"', ""))


def _too_deep() -> Refused:
    return Refused(Code.INVALID_JSON, "The frame is nested too deeply.")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its keys and values. A key whose value is ``null`` is left out."""
    if len(pairs) > KEYS:
        raise Refused(Code.INVALID_FRAME, f"An object of the frame has more than {KEYS} keys.")
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise Refused(Code.INVALID_FRAME, f"{_shown(key, quote=False)}: given twice.")
        seen.add(key)
    return {key: value for key, value in pairs if value is not None}


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:  # it is beyond every bound, and stays so
        return -LARGEST if digits.startswith("-") else LARGEST
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise Refused(Code.INVALID_JSON, f"{name} is not JSON.")


def _match(value: dict[str, Any], pattern: str, *keys: str) -> str | None:
    """Return the first of the keys whose value fits, of a frame that is not usable as a whole."""
    found = (value.get(key) for key in keys)
    return next((v for v in found if isinstance(v, str) and re.fullmatch(pattern, v)), None)


def _refusal(error: ValidationError) -> Refused:
    """Make a refusal of the first thing that a model found wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    if (first["type"], first["loc"]) == ("too_long", ("messages",)):
        return Refused(Code.TOO_LONG, f"messages: at most {MESSAGES}.")
    where = ".".join(_shown(part, quote=False) for part in first["loc"])
    what = {
        "extra_forbidden": "no such key",
        "string_pattern_mismatch": "16 to 64 of A-Z, a-z, 0-9, _ and -",
        "string_unicode": "has half of a surrogate pair",
    }.get(first["type"])
    if what is None:
        what = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return Refused(Code.INVALID_FRAME, f"{where}: {what}." if where else f"{what}.")


def _shown(value: object, *, quote: bool = True) -> str:
    """Show what a client sent in a message: short, and whatever it is, safe to encode."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text if len(text) <= 40 else text[:40] + "…"  # noqa: PLR2004
    text = printable(text)
    return f'"{text}"' if quote else text
