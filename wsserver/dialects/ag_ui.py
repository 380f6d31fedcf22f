"""The events of AG-UI, version 1: one run of an agent is one reply.

Source: https://docs.ag-ui.com/concepts/events. Keys are in camel case, and none is null.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wsserver.content import Usage
from wsserver.dialects.chat import Chat, conversation_of
from wsserver.errors import Code, Refused
from wsserver.live import Generation
from wsserver.pieces import Kind, Run
from wsserver.protocol import Done, Error, Terminal

PATH = "/agui"

# Kinds of pieces -> the prefix of their events. The other kinds have no events.
_MESSAGES: dict[Kind, str] = {"text": "TEXT_MESSAGE", "thinking": "REASONING_MESSAGE"}
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_SETTINGS = ("model", "max_tokens", "temperature")  # keys of `forwardedProps` that a prompt has too


def parse_chat(body: Mapping[str, Any]) -> Chat:
    """Parse the input of a run.

    Raises:
        Refused: the body is not the input of a run that the server can make.
    """
    for key in ("threadId", "runId"):
        if not isinstance(body.get(key), str) or not body[key]:
            raise Refused(Code.INVALID_FRAME, f"{key}: must be a text.")
    if not isinstance(body.get("messages"), list):
        raise Refused(Code.INVALID_FRAME, "messages: must be a list.")
    messages: list[dict[str, Any]] = []
    system: list[str] = []
    for number, message in enumerate(body["messages"]):
        role = _ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
        if role is None:  # the messages of tools and activities are not for the model
            continue
        blocks = _blocks(message.get("content"), number)
        if role == "system":
            system += [block["text"] for block in blocks if block["type"] == "text"]
        elif blocks:
            messages.append({"role": role, "content": blocks})
    if not messages or messages[-1]["role"] != "user":
        raise Refused(Code.INVALID_FRAME, "messages: the last one must be the user's.")
    given = body.get("forwardedProps")
    keys = {k: given[k] for k in _SETTINGS if k in given} if isinstance(given, dict) else {}
    if system:
        keys["system"] = "\n\n".join(system)
    return Chat(conversation_of(body["threadId"]), messages, keys)


def _blocks(content: object, number: int) -> list[dict[str, Any]]:
    """Return the content of a message as content blocks."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content.strip() else []
    if content is None:
        return []
    if not isinstance(content, list):
        raise Refused(Code.INVALID_FRAME, f"messages.{number}.content: must be a text or a list.")
    return [block for part in content if (block := _block(part)) is not None]


def _block(part: object) -> dict[str, Any] | None:
    if not isinstance(part, dict):
        return None
    kind, source = part.get("type"), part.get("source")
    if kind == "text" and isinstance(text := part.get("text"), str) and text.strip():
        return {"type": "text", "text": text}
    if kind not in ("image", "document") or not isinstance(source, dict):
        return None
    if source.get("type") == "url":
        return {"type": kind, "source": {"type": "url", "url": source.get("value")}}
    media = {"media_type": source.get("mimeType"), "data": source.get("value")}
    return {"type": kind, "source": {"type": "base64", **media}}


class AgUi:
    """The dialect of AG-UI. It remembers which message is open, so each client has its own.

    Args:
        body: the input of the run.
    """

    comment = b":\n\n"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._run = {"threadId": body["threadId"], "runId": body["runId"]}
        self._generation = ""
        self._model = ""
        self._open: tuple[Kind, int] | None = None

    def start(self, generation: Generation, **_: object) -> bytes:
        """Encode the start of the run."""
        self._generation, self._model = generation.id, generation.model
        return _event("RUN_STARTED", **self._run)

    def run(self, _: Generation, run: Run) -> bytes:
        """Encode text or reasoning. Pieces of other kinds have no events."""
        if run.kind not in _MESSAGES:
            return b""
        written = b""
        if self._open != (run.kind, run.block):
            written = self._close()
            self._open = run.kind, run.block
            name = self._name()
            if run.kind == "thinking":
                written += _event("REASONING_START", messageId=name)
            role = "reasoning" if run.kind == "thinking" else "assistant"
            written += _event(f"{_MESSAGES[run.kind]}_START", messageId=name, role=role)
        content = f"{_MESSAGES[run.kind]}_CONTENT"
        return written + _event(content, messageId=self._name(), delta=run.data)

    def terminal(self, terminal: Terminal) -> bytes:
        """Encode the end of the run."""
        written = self._close()
        usage = [] if terminal.usage is None else [_usage(self._model, terminal.usage)]
        if not isinstance(terminal, Done):
            event = {"message": terminal.message, "code": terminal.code, "usage": usage}
            return written + _event("RUN_ERROR", **event)
        outcome = {"type": "success" if terminal.by is None else "cancelled"}
        result = {"reason": terminal.reason} | ({"by": terminal.by} if terminal.by else {})
        more = {"result": result, "outcome": outcome, "usage": usage}
        return written + _event("RUN_FINISHED", **self._run, **more)

    @staticmethod
    def error(error: Error) -> bytes:
        """Encode an error."""
        return _event("RUN_ERROR", message=error.message, code=error.code)

    def _name(self) -> str:
        """Return the id of the open message: of the reply for its first block."""
        assert self._open is not None
        kind, block = self._open
        return self._generation if kind == "text" and not block else f"{self._generation}-{block}"

    def _close(self) -> bytes:
        """End the open message."""
        if self._open is None:
            return b""
        name, (kind, _) = self._name(), self._open
        self._open = None
        written = _event(f"{_MESSAGES[kind]}_END", messageId=name)
        return written + _event("REASONING_END", messageId=name) if kind == "thinking" else written


def _usage(model: str, usage: Usage) -> dict[str, Any]:
    return {
        "model": model,
        "inputTokens": usage.input_tokens,
        "outputTokens": usage.output_tokens,
        "cachedInputTokens": usage.cache_read_input_tokens,
        "cacheWriteInputTokens": usage.cache_creation_input_tokens,
    }


def _event(name: str, **keys: Any) -> bytes:
    return f"data: {json.dumps({'type': name, **keys}, ensure_ascii=False)}\n\n".encode()
