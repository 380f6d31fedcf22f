"""The events of AG-UI, version 1: one run of an agent is one reply.

Source: https://docs.ag-ui.com/concepts/events. Keys are in camel case, and none is null.
"""

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from wsserver.content import Block, Document, Image, Message, Text, Thinking, Usage
from wsserver.dialects.chat import Chat, conversation_of, separate_system
from wsserver.errors import Code, Refused
from wsserver.hub.live import Generation
from wsserver.pieces import Run
from wsserver.protocol import Done, Error, Terminal
from wsserver.text import well_formed

PATH = "/agui"
VERSION = "1.0"
ID = 256  # characters of an id that a client chose

_EVENTS = {"assistant": "TEXT_MESSAGE", "reasoning": "REASONING_MESSAGE"}  # of messages, by role
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_SETTINGS = ("id", "model", "max_tokens", "temperature")  # keys of `forwardedProps` and of a prompt


def parse_chat(body: Mapping[str, Any]) -> Chat:
    """Parse the input of a run.

    Raises:
        Refused: the body is not the input of a run that the server can make.
    """
    check_run(body)
    if not isinstance(body.get("messages"), list):
        raise Refused(Code.INVALID_FRAME, "messages: must be a list.")
    given: list[tuple[object, list[dict[str, Any]]]] = []
    for number, message in enumerate(body["messages"]):
        role = _ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
        if role is not None:  # the messages of tools and activities are not for the model
            given.append((role, _blocks(message.get("content"), number)))
    messages, keys = separate_system(given)
    props = body.get("forwardedProps")
    if isinstance(props, dict):
        keys |= {key: props[key] for key in _SETTINGS if props.get(key) is not None}
    return Chat(conversation_of(body["threadId"]), messages, keys)


def check_run(body: Mapping[str, Any]) -> None:
    """Check that a body names its thread and its run.

    Raises:
        Refused: it does not.
    """
    for key in ("threadId", "runId"):
        if not _is_id(body.get(key)):
            raise Refused(Code.INVALID_FRAME, f"{key}: must be a text of at most {ID} characters.")


def _is_id(value: object) -> bool:
    """Whether a value can be an id that the events repeat."""
    return isinstance(value, str) and 0 < len(value) <= ID and value == well_formed(value)


def _blocks(content: object, number: int) -> list[dict[str, Any]]:
    """Return the content of a message as content blocks."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content.strip() else []
    if content is None:
        return []
    if not isinstance(content, list):
        raise Refused(Code.INVALID_FRAME, f"messages.{number}.content: must be a text or a list.")
    return _of_parts(content)


def _of_parts(parts: list[Any]) -> list[dict[str, Any]]:
    return [block for part in parts if (block := _block(part)) is not None]


def _block(part: object) -> dict[str, Any] | None:
    """Return the content block of a part; None for a part that the model does not get."""
    if not isinstance(part, dict):
        return None
    kind, source = part.get("type"), part.get("source")
    if kind == "text" and isinstance(text := part.get("text"), str) and text.strip():
        return {"type": "text", "text": text}
    if kind == "binary":  # of clients before version 1
        kind = "image" if str(part.get("mimeType")).startswith("image/") else "document"
        source = next(
            (
                {"type": name, "value": part[name], "mimeType": part.get("mimeType")}
                for name in ("url", "data")
                if part.get(name)
            ),
            None,
        )
    if kind not in ("image", "document") or not isinstance(source, dict):
        return None
    value = source.get("value")
    match source.get("type"):
        case "url":
            return {"type": kind, "source": {"type": "url", "url": value}}
        case "data":
            media = {"media_type": source.get("mimeType"), "data": value}
            return {"type": kind, "source": {"type": "base64", **media}}
    return None


class AgUi:
    """The dialect of AG-UI. It remembers which message is open, so each client has its own.

    The text of a reply is one message, whose id is that of the generation. Each block of thinking
    is a message of its own.

    Args:
        body: the input of the run.
        history: the messages before the prompt. The client then replaces its messages by these and
            the prompt, and builds the reply anew. None for a client that sent the prompt.
    """

    comment = b":\n\n"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, body: Mapping[str, Any], history: Iterable[Message] | None = None) -> None:
        self._run = {"threadId": body["threadId"], "runId": body["runId"]}
        parent = body.get("parentRunId")
        self._parent = {"parentRunId": parent} if _is_id(parent) else {}
        self._given = None if history is None else body.get("messages")
        self._history = history
        self._open: tuple[str, str] | None = None  # the role and the id of the open message

    def start(self, generation: Generation, **_: object) -> bytes:
        """Encode the start of the run, with the messages before the reply."""
        self._generation, self._model = generation.id, generation.model
        return self._begin(generation)

    def run(self, _: Generation, run: Run) -> bytes:
        """Encode text or reasoning. Pieces of other kinds have no events."""
        if run.kind == "text":
            opened = "assistant", self._generation
        elif run.kind == "thinking":
            opened = "reasoning", f"{self._generation}-{run.block}"
        else:
            return b""
        role, name = opened
        written = b""
        if self._open != opened:
            written = self._close()
            self._open = opened
            if role == "reasoning":
                written += _event("REASONING_START", messageId=name)
            written += _event(f"{_EVENTS[role]}_START", messageId=name, role=role)
        return written + _event(f"{_EVENTS[role]}_CONTENT", messageId=name, delta=run.data)

    def terminal(self, terminal: Terminal) -> bytes:
        """Encode the end of the run."""
        written = self._close()
        usage = {} if terminal.usage is None else {"usage": [_usage(self._model, terminal.usage)]}
        if not isinstance(terminal, Done):
            return written + _event(
                "RUN_ERROR", message=terminal.message, code=terminal.code, **usage
            )
        if terminal.by is not None:
            return written + self._finish("cancelled", metadata={"by": terminal.by}, **usage)
        return written + self._finish("success", result={"reason": terminal.reason}, **usage)

    @staticmethod
    def error(error: Error) -> bytes:
        """Encode an error."""
        return _event("RUN_ERROR", message=error.message, code=error.code)

    def without_reply(self) -> bytes:
        """Encode a whole run that has only the messages of the history."""
        return self._begin(None) + self._finish("success")

    def _begin(self, generation: Generation | None) -> bytes:
        started = _event("RUN_STARTED", **self._run, **self._parent, protocolVersion=VERSION)
        if self._history is None:
            return started
        messages = [
            shown for message in self._history for shown in _messages(message, message.id or "")
        ]
        if generation is not None:
            *earlier, prompt = generation.prompt.new_messages
            for number, message in enumerate(earlier):
                messages += _messages(message, f"{generation.id}.{number}")
            messages += _messages(prompt, generation.id)
            reply = Message("assistant", generation.log.pieces.blocks(unfinished=True))
            # The client may have a part of the reply, to which it would append.
            messages += [{**shown, "content": ""} for shown in _messages(reply, generation.id)]
        _take_ids(messages, self._given)
        self._given = self._history = None  # not needed for the rest of the run
        return started + _event("MESSAGES_SNAPSHOT", messages=messages)

    def _finish(self, outcome: str, **keys: Any) -> bytes:
        return _event("RUN_FINISHED", **self._run, outcome={"type": outcome}, **keys)

    def _close(self) -> bytes:
        """End the open message."""
        if self._open is None:
            return b""
        (role, name), self._open = self._open, None
        written = _event(f"{_EVENTS[role]}_END", messageId=name)
        return written + _event("REASONING_END", messageId=name) if role == "reasoning" else written


def _messages(message: Message, name: str) -> list[dict[str, Any]]:
    """Return the messages of AG-UI that a message is; ``name`` is the id of its text."""
    if message.role == "user":
        parts = [part for block in message.blocks if (part := _part(block)) is not None]
        plain = len(message.blocks) <= 1 and message.text
        return [{"id": f"{name}-prompt", "role": "user", "content": plain or parts or ""}]
    found: dict[str, dict[str, Any]] = {}
    for number, block in enumerate(message.blocks):
        if isinstance(block, Thinking):
            key = f"{name}-{number}"
            found[key] = {"id": key, "role": "reasoning", "content": block.thinking}
        elif isinstance(block, Text) and name not in found:
            found[name] = {"id": name, "role": "assistant", "content": message.text}
    return list(found.values())


def _take_ids(messages: list[dict[str, Any]], given: object) -> None:
    """Give messages the ids that the client has for them.

    A client updates messages of known ids in their places, and appends the others. Its message is
    the same as ours if both have the same role and content, and the same message follows. Nothing
    may follow the newest prompt yet.
    """
    names: dict[tuple[str, str, str], str] = {}
    following = ""
    for message in reversed(given if isinstance(given, list) else []):
        if isinstance(message, dict) and _is_id(message.get("id")):
            names[_key(message, following)] = following = message["id"]
    following, newest = "", True
    for message in reversed(messages):
        name = names.get(_key(message, following))
        if message["role"] == "user":
            name = name or (names.get(_key(message, "")) if newest else None)
            newest = False
        message["id"] = following = name or message["id"]


def _key(message: Mapping[str, Any], following: str) -> tuple[str, str, str]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return str(message.get("role")), json.dumps(_of_parts(parts)), following


def _part(block: Block) -> dict[str, Any] | None:
    """Return the part of a content block; None for a block that has none."""
    if isinstance(block, Text):
        return {"type": "text", "text": block.text}
    if isinstance(block, Image | Document):
        match block.source:
            case {"type": "url", "url": str(url)}:
                return {"type": block.type, "source": {"type": "url", "value": url}}
            case {"type": "base64", "media_type": str(kind), "data": str(data)}:
                source = {"type": "data", "value": data, "mimeType": kind}
                return {"type": block.type, "source": source}
    return None


def _usage(model: str, usage: Usage) -> dict[str, Any]:
    """Return the usage with totals: AG-UI counts the tokens of the cache as input, too."""
    read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
    counts = {
        "inputTokens": usage.input_tokens + read + written,
        "outputTokens": usage.output_tokens,
        "cachedInputTokens": read,
        "cacheWriteInputTokens": written,
    }
    if usage.thinking_tokens:
        counts["reasoningTokens"] = usage.thinking_tokens
    return {"model": model, **counts}


def _event(name: str, **keys: Any) -> bytes:
    return f"data: {json.dumps({'type': name, **keys}, ensure_ascii=False)}\n\n".encode()
