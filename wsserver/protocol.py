"""The frames of the protocol as models.

``PROTOCOL.md`` beside this file is the reference, and :mod:`wsserver.schema` its machine-readable
form. :mod:`wsserver.parsing` parses the frames of clients, :mod:`wsserver.encoding` encodes those
of the server.
"""

from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wsserver.content import Message, text_of_block
from wsserver.errors import Code
from wsserver.wire import (
    Content,
    FrameUsage,
    HistoryMessage,
    Id,
    NonBlank,
    PromptMessage,
    RequestId,
    WellFormed,
)

SUBPROTOCOL = "wsserver.v1"

StoppedBy = Literal["client", "deleted", "disconnect", "replaced", "timeout", "shutdown"]


MESSAGES = 1000  # most messages of one prompt: 500 turns, more than people have in a conversation


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
    """A frame of a client. The answer or the error has the same ``request``."""

    request: RequestId | None = None


class Prompt(_Request):
    """Ask for a reply: to ``prompt`` in a conversation, or to ``messages`` without one."""

    type: Literal["prompt"] = "prompt"
    prompt: Content | None = None
    messages: Annotated[list[PromptMessage], Field(max_length=MESSAGES, fail_fast=True)] | None = (
        None
    )
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
    def _ends_with_user(cls, value: list[Message] | None) -> list[Message] | None:
        if value is not None and not (value and value[-1].role == "user"):
            raise ValueError("the last message must have the role user")
        return value

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either `prompt` or `messages`")
        if self.messages is not None and self.conversation is not None:
            raise ValueError("`messages` cannot be combined with `conversation`")
        if self.messages is not None and self.retry_of is not None:
            raise ValueError("`retry_of` needs `prompt`, because it names a turn of a conversation")
        return self

    @cached_property
    def new_messages(self) -> tuple[Message, ...]:
        """The messages in the prompt: the one of ``prompt``, or all ``messages``."""
        if self.messages is not None:
            return tuple(self.messages)
        return (Message("user", self.prompt or ()),)

    def bare(self) -> Self:
        """Return the prompt without its ``request``: it may be sent again as another request."""
        return self if self.request is None else self.model_copy(update={"request": None})

    @property
    def text(self) -> str:
        """The system prompt and all content, each block as text or as JSON, joined."""
        blocks = (text_of_block(block) for message in self.new_messages for block in message.blocks)
        return "".join((self.system or "", *blocks))

    @property
    def size(self) -> int:
        """Bytes of :attr:`text` in UTF-8."""
        return len(self.text.encode())


class Stop(_Request):
    """Stop the generation ``id``; without ``id``, all generations that the socket follows."""

    type: Literal["stop"] = "stop"
    id: Annotated[str, Field(max_length=64)] | None = None


class Auth(_Request):
    """Authenticate a client that cannot set headers, or renew a token before it expires."""

    type: Literal["auth"] = "auth"
    token: Annotated[WellFormed, Field(min_length=1, max_length=8192, repr=False)]


class Ping(_Request):
    """Check the connection; the answer is ``pong``."""

    type: Literal["ping"] = "ping"


class Resume(_Request):
    """Follow the generation ``id`` again, beginning with the piece after ``after``."""

    type: Literal["resume"] = "resume"
    id: Id
    after: Annotated[int, Field(ge=0)] = 0


class Open(_Request):
    """Get the history of a conversation, and follow its running and later generations.

    With ``before``, only get the part of the history before that point. ``size`` limits the bytes
    of the messages in the answer, for a connection that breaks during large frames.
    """

    type: Literal["open"] = "open"
    conversation: Id
    before: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[int, Field(ge=1024)] | None = None


class List(_Request):
    """Get the client's conversations, newest first; ``before`` is the ``next`` of the last page."""

    type: Literal["list"] = "list"
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    before: Annotated[WellFormed, Field(max_length=128)] | None = None


class Rename(_Request):
    """Change the title of a conversation."""

    type: Literal["rename"] = "rename"
    conversation: Id
    title: Annotated[NonBlank, Field(max_length=200)]


class Delete(_Request):
    """Stop the generations of a conversation, and delete the conversation."""

    type: Literal["delete"] = "delete"
    conversation: Id


class CloseConversation(_Request):
    """End what ``open`` began: follow only the generations that this socket asked for."""

    model_config = ConfigDict(title="Close")

    type: Literal["close"] = "close"
    conversation: Id


ClientFrame = (
    Prompt | Stop | Resume | Open | List | Rename | Delete | CloseConversation | Auth | Ping
)

CLIENT_FRAMES: dict[str, type[ClientFrame]] = {
    model.model_fields["type"].default: model for model in get_args(ClientFrame)
}


# Server to client.


class _Answer(_Frame):
    """A frame that may answer a frame of the client. It then has the ``request`` of that frame."""

    type: str  # the first key of the JSON, for people who read frames
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

    ``auth``: the client has to send ``auth`` first. ``principal``: the client's, if known.
    ``models``: the models that a prompt can choose, the default first; left out with ``auth``.
    """

    type: Literal["hello"] = "hello"
    protocol: Literal["wsserver.v1"] = "wsserver.v1"
    auth: Literal[True] | None = None
    principal: str | None = None
    models: tuple[str, ...] | None = None
    limits: Limits


class Start(_Answer):
    """The prompt was accepted, or found again. ``queued`` is the place of a prompt that waits.

    The next frames begin with the piece after ``after``, 0 if left out. If another socket sent the
    prompt, ``prompt`` is its text, and ``retry_of`` the turn that it replaces. ``blocks`` has the
    types of the prompt's blocks, unless it is a single text block.
    """

    type: Literal["start"] = "start"
    id: str
    conversation: str | None = None
    model: str
    queued: int | None = None
    after: int | None = None
    prompt: str | None = None
    blocks: list[str] | None = None
    retry_of: str | None = None


class _Content(_Frame):
    """A part of the reply's content: one piece, or several merged; ``seq`` is that of the last.

    ``block`` is the index of the content block; left out if 0.
    """

    type: str
    id: str
    seq: int
    block: int | None = None


class Token(_Content):
    """Text up to and including piece ``seq``: one piece, or several merged.

    ``block`` is the index of the text block in the reply; 0 if left out. A frame with a
    ``citation`` has an empty text: the citation belongs to the block.
    """

    type: Literal["token"] = "token"
    text: str
    citation: dict[str, Any] | None = None


class ThinkingFrame(_Content):
    """The same for the model's extended thinking.

    A frame with a ``signature`` has an empty text. It has the signature of the block, or a part.
    """

    model_config = ConfigDict(title="Thinking")

    type: Literal["thinking"] = "thinking"
    text: str
    signature: str | None = None


class BlockFrame(_Content):
    """A content block of another type, such as ``tool_use``.

    ``partial_json`` is the JSON of the block as a text, or a part of the JSON: a client joins the
    parts with the same ``block``.
    """

    model_config = ConfigDict(title="Block")

    type: Literal["block"] = "block"
    partial_json: str


class Done(_Frame):
    """Terminal: the reply has ended. ``seq`` is that of the last piece, 0 if there is none.

    ``thought``: seconds that the model thought; left out without thinking.
    """

    type: Literal["done"] = "done"
    id: str
    seq: int
    reason: str
    by: StoppedBy | None = None
    usage: FrameUsage
    thought: float | None = None
    saved: Literal[False] | None = None


class Error(_Answer):
    """With ``id``: the terminal of that generation. Without: a frame of the client was refused.

    ``about`` is then the ``id`` or the ``conversation`` of that frame, if the frame had one.
    """

    type: Literal["error"] = "error"
    code: Code
    message: str
    id: str | None = None
    seq: int | None = None
    about: str | None = None
    retryable: bool
    retry_after: float | None = None
    usage: FrameUsage | None = None
    thought: float | None = None
    saved: Literal[False] | None = None
    ref: str


class Authenticated(_Answer):
    """The answer to ``auth``: the principal, and when the token expires.

    ``expires`` is in seconds since 1970, ``expires_in`` in seconds from now, for a client whose
    clock may be wrong. ``models``: the models that a prompt can choose, the default first.
    """

    type: Literal["authenticated"] = "authenticated"
    principal: str
    models: tuple[str, ...]
    expires: float | None = None
    expires_in: float | None = None


class Pong(_Answer):
    """The answer to ``ping``."""

    type: Literal["pong"] = "pong"


class History(_Answer):
    """The messages of a conversation, oldest first, without those of running generations.

    An ``open`` with this ``before`` gets older messages. It is left out if there are none.
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
    """A page of the client's conversations. ``next`` is the ``before`` of the next page."""

    type: Literal["conversations"] = "conversations"
    items: list[ConversationItem]
    next: str | None = None


class Renamed(_Answer):
    """The conversation has another title."""

    type: Literal["renamed"] = "renamed"
    conversation: str
    title: str


class Deleted(_Answer):
    """The conversation was deleted."""

    type: Literal["deleted"] = "deleted"
    conversation: str


class Closed(_Answer):
    """The socket no longer follows the conversation."""

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
    model.model_fields["type"].default: model for model in get_args(ServerFrame)
}

ANSWERS = {
    "prompt": "start",
    "stop": "stopped",
    "resume": "start",
    "open": "history",
    "list": "conversations",
    "rename": "renamed",
    "delete": "deleted",
    "close": "closed",
    "auth": "authenticated",
    "ping": "pong",
}
"""The type of the answer to each frame of a client. The answer to any frame may be ``error``."""
