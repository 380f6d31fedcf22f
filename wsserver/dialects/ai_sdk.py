"""The UI message stream of the AI SDK, version 1, which its ``useChat`` reads.

Source: https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol, "UI message stream protocol".
"""

import base64
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wsserver.dialects.chat import Chat, conversation_of, separate_system
from wsserver.errors import Code, Refused
from wsserver.hub.live import Generation
from wsserver.pieces import Kind, Run
from wsserver.protocol import Done, Error, Terminal
from wsserver.wire import dump_usage

# The names of parts, by kind of piece. A citation is a source; the other kinds have no part.
_PARTS: dict[Kind, str] = {"text": "text", "thinking": "reasoning"}
_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool-calls",
    "refusal": "content-filter",
}
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,(.*)", re.DOTALL)
_SETTINGS = ("model", "system", "max_tokens", "temperature")  # keys of the body and of a prompt


def recognizes(body: Mapping[str, Any]) -> bool:
    """Whether a body is one of ``useChat``: a message of it has parts."""
    messages = body.get("messages", [body.get("message")])
    if not isinstance(messages, list):
        return False
    return any(isinstance(message, dict) and "parts" in message for message in messages)


def parse_chat(body: Mapping[str, Any]) -> Chat:
    """Parse the body of a request.

    An app may send only the newest message, as ``message``. The server gets no parts of tools,
    reasoning, sources and data: a reply of another server may have such parts.

    Raises:
        Refused: the body is not one of ``useChat``.
    """
    name = body.get("id")
    if not isinstance(name, str) or not name:
        raise Refused(Code.INVALID_FRAME, "id: must be the id of the chat, a text.")
    given: list[tuple[object, list[dict[str, Any]]]] = []
    previous = None
    for number, message in enumerate(body.get("messages", [body.get("message")])):
        if not isinstance(message, dict) or not isinstance(message.get("parts"), list):
            raise Refused(Code.INVALID_FRAME, f"messages.{number}: must have `parts`.")
        blocks = [block for part in message["parts"] if (block := _block(part)) is not None]
        given.append((message.get("role"), blocks))
        if blocks and message.get("role") == "assistant":
            previous = str(message.get("id", ""))
    messages, system = separate_system(given)
    if all(message["role"] == "user" for message in messages):
        messages = messages[-1:]  # the earlier ones were refused
    return Chat(
        conversation_of(name),
        messages,
        {**{key: body[key] for key in _SETTINGS if key in body}, **system},
        replaces=body.get("trigger") == "regenerate-message" or body.get("messageId") is not None,
        previous=previous,
        whole="messages" in body,
    )


def _block(part: object) -> dict[str, Any] | None:
    """Return the content block of a part; None for a part that the model does not get."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]} if part["text"].strip() else None
    if part.get("type") == "file" and isinstance(url := part.get("url"), str):
        match = _DATA_URL.fullmatch(url)
        kind = str(part.get("mediaType") or (match[1] if match else ""))
        if kind.startswith("image/"):
            return {"type": "image", "source": _source(kind, url, match)}
        title = {"title": part["filename"]} if isinstance(part.get("filename"), str) else {}
        return {"type": "document", "source": _source(kind, url, match), **title}
    return None


def _source(kind: str, url: str, match: re.Match[str] | None) -> dict[str, str]:
    """Return the source of a file, as in the Messages API."""
    if match is None:
        return {"type": "url", "url": url}
    if not kind.startswith("text/"):
        return {"type": "base64", "media_type": kind, "data": match[2]}
    try:
        text = base64.b64decode(match[2]).decode(errors="replace")
    except ValueError:
        raise Refused(Code.INVALID_FRAME, "url: is not base64.") from None
    return {"type": "text", "media_type": "text/plain", "data": text}


class AiSdk:
    """The dialect of ``useChat``. It remembers which part is open, so each client has its own.

    A client of this dialect has no place to go on from: it reads each reply from the start.
    """

    comment = b":\n\n"
    headers: Mapping[str, str] = MappingProxyType({"x-vercel-ai-ui-message-stream": "v1"})

    def __init__(self) -> None:
        self._open: tuple[str, int] | None = None  # the name and the block of the open part
        self._sources: set[str] = set()  # the ids of the sources that were written

    def start(self, generation: Generation, **_: object) -> bytes:
        """Encode the start of the message and of its only step."""
        metadata = _without_none(model=generation.model, conversation=generation.conversation_id)
        start = {"type": "start", "messageId": generation.id, "messageMetadata": metadata}
        return _part(start) + _part({"type": "start-step"})

    def run(self, _: Generation, run: Run) -> bytes:
        """Encode text, reasoning or a source. Pieces of other kinds have no part."""
        if run.kind == "citation":
            source = _source_of(json.loads(run.data))
            known = source["sourceId"] in self._sources
            self._sources.add(source["sourceId"])
            return b"" if known else _part(source)
        name = _PARTS.get(run.kind)
        if name is None:
            return b""
        written = b""
        if self._open != (name, run.block):
            written = self._close()
            self._open = name, run.block
            written += _part({"type": f"{name}-start", "id": str(run.block)})
        return written + _part({"type": f"{name}-delta", "id": str(run.block), "delta": run.data})

    def terminal(self, terminal: Terminal) -> bytes:
        """Encode the end of the message."""
        written = self._close()
        usage = None if terminal.usage is None else dump_usage(terminal.usage)
        if isinstance(terminal, Done):
            metadata = _without_none(reason=terminal.reason, by=terminal.by, usage=usage)
            reason = _REASONS.get(terminal.reason, "other")
            written += _part({"type": "finish-step"})
            written += _part(
                {"type": "finish", "finishReason": reason, "messageMetadata": metadata}
            )
        else:
            metadata = _without_none(code=terminal.code, ref=terminal.ref, usage=usage)
            written += _part({"type": "message-metadata", "messageMetadata": metadata})
            written += self.error(terminal)
        return written + b"data: [DONE]\n\n"

    @staticmethod
    def error(error: Error) -> bytes:
        """Encode an error."""
        return _part({"type": "error", "errorText": error.message})

    def _close(self) -> bytes:
        """End the open part."""
        if self._open is None:
            return b""
        (name, block), self._open = self._open, None
        return _part({"type": f"{name}-end", "id": str(block)})


def _source_of(citation: dict[str, Any]) -> dict[str, str]:
    """Return the source that a citation of the Messages API names.

    Values of other types are left out: the AI SDK refuses the whole reply for one of them.
    """
    texts = {key: value for key, value in citation.items() if isinstance(value, str) and value}
    title = texts.get("title")
    if url := texts.get("url"):
        return _without_none(type="source-url", sourceId=url, url=url, title=title)
    index = citation.get("document_index")
    index = index if isinstance(index, int) else 0
    return {
        "type": "source-document",
        "sourceId": f"document-{index}",
        "mediaType": "application/pdf" if texts.get("type") == "page_location" else "text/plain",
        "title": texts.get("document_title") or title or f"Document {index + 1}",
    }


def _without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _part(part: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n".encode()
