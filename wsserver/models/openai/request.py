"""The body of a Chat Completions request.

https://platform.openai.com/docs/api-reference/chat/create
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from wsserver.content import (
    Block,
    Document,
    Image,
    Message,
    Text,
    ToolResult,
    ToolUse,
    parse_content,
)
from wsserver.errors import Code, ModelError
from wsserver.models.base import Request


def arguments(request: Request, limit: str) -> dict[str, Any]:
    """Return the body of the request for a reply.

    Args:
        request: the conversation and the parameters.
        limit: the key for the number of output tokens.

    Raises:
        ModelError: a block has no counterpart in the API.
    """
    body: dict[str, Any] = {
        "model": request.model,
        "messages": list(_messages(request)),
        limit: request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    return body


def _messages(request: Request) -> Iterator[dict[str, Any]]:
    if request.system:
        yield {"role": "system", "content": request.system}
    answers: Sequence[Message | None] = [*request.messages[1:], None]
    for message, answer in zip(request.messages, answers, strict=True):
        if message.role == "assistant":
            yield _assistant(message, answer)
        else:
            yield from _user(message)


def _assistant(message: Message, answer: Message | None) -> dict[str, Any]:
    """Convert a reply. Its thinking is left out: the API takes none back.

    The API refuses a tool call without the tool's result.
    """
    results = {
        block.tool_use_id
        for block in (() if answer is None else answer.blocks)
        if isinstance(block, ToolResult)
    }
    calls = [_call(b) for b in message.blocks if isinstance(b, ToolUse) and b.id in results]
    reply: dict[str, Any] = {"role": "assistant", "content": message.text}
    return reply | {"tool_calls": calls} if calls else reply


def _call(block: ToolUse) -> dict[str, Any]:
    given = json.dumps(dict(block.input), ensure_ascii=False)
    function = {"name": block.name, "arguments": given}
    return {"id": block.id, "type": "function", "function": function}


def _user(message: Message) -> Iterator[dict[str, Any]]:
    """Convert a message of the user. The results of tools are messages of their own, and first."""
    rest = []
    for block in message.blocks:
        if isinstance(block, ToolResult):
            content = _text(parse_content(block.content))
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
        else:
            rest.append(block)
    if all(isinstance(block, Text) for block in rest):
        if rest:
            yield {"role": "user", "content": message.text}
        return
    yield {"role": "user", "content": [_part(block) for block in rest]}


def _text(blocks: Iterable[Block]) -> str:
    return "".join(block.text for block in blocks if isinstance(block, Text))


def _part(block: Block) -> dict[str, Any]:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text}
    if isinstance(block, Image) and (url := _url(block.source)) is not None:
        return {"type": "image_url", "image_url": {"url": url}}
    if isinstance(block, Document):
        source = block.source
        if source.get("type") == "text":
            return {"type": "text", "text": str(source.get("data"))}
        if source.get("type") == "content":
            return {"type": "text", "text": _text(parse_content(source.get("content")))}
        if source.get("type") == "base64":
            name = block.extra.get("title") or "document.pdf"
            return {"type": "file", "file": {"filename": name, "file_data": _url(source)}}
    raise ModelError(
        Code.BAD_REQUEST, f"content: the model's API takes no {block.type} of this source."
    )


def _url(source: Mapping[str, Any]) -> str | None:
    if source.get("type") == "base64":
        return f"data:{source.get('media_type')};base64,{source.get('data')}"
    return str(source["url"]) if source.get("type") == "url" and "url" in source else None
