"""The body of a request to the Messages API: arguments and breakpoints of the prompt cache.

https://platform.claude.com/docs/en/api/messages
"""

from collections.abc import Sequence
from typing import Any

from wsserver.content import (
    Message,
    Other,
    RedactedThinking,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    dump_block,
)
from wsserver.models.base import Request
from wsserver.settings import Settings
from wsserver.text import tokens_in

LOOK_BACK = 20  # blocks that the API checks for cached content, up to a breakpoint
MIN_CACHED = 1024  # tokens; the API caches nothing shorter

_CACHED = {"type": "ephemeral"}


def arguments(request: Request, settings: Settings, *, takes_temperature: bool) -> dict[str, Any]:
    """Return the body of the request for a reply.

    Args:
        request: the conversation and the parameters.
        settings: prompt caching and thinking.
        takes_temperature: whether the model accepts a temperature.
    """
    body: dict[str, Any] = {
        "model": request.model,
        "max_tokens": request.max_tokens,
        "messages": _messages(request.messages),
        "stream": True,
    }
    if request.system:
        body["system"] = request.system
    if settings.prompt_caching:
        _set_breakpoints(body)
    thinking = settings.thinking
    if thinking == "adaptive":
        body["thinking"] = {"type": "adaptive", "display": "summarized"}
    elif thinking == "disabled":
        body["thinking"] = {"type": "disabled"}
    elif thinking and int(thinking) < request.max_tokens:  # as the API demands
        body["thinking"] = {"type": "enabled", "budget_tokens": int(thinking)}
    # While a model thinks, the API accepts only the default temperature.
    thinks = body.get("thinking", {}).get("type") in {"enabled", "adaptive"}
    if request.temperature is not None and takes_temperature and not thinks:
        body["temperature"] = request.temperature
    return body


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages to the API's format.

    The conversion of a reply depends only on the reply and on the message after it, so that the
    prompt cache matches the same beginning again.
    """
    answers: list[Message | None] = [*messages[1:], None]
    return [
        {"role": message.role, "content": _content(message, answer)}
        for message, answer in zip(messages, answers, strict=True)
    ]


def _content(message: Message, answer: Message | None) -> str | list[dict[str, Any]]:
    """Convert the content of a message to the API's format.

    The API needs the thinking of a reply together with the results of the reply's tools, and
    refuses thinking without its signature. It refuses a tool call without the tool's result.
    """
    blocks = message.blocks
    if len(blocks) == 1 and isinstance(blocks[0], Text):  # nearly all messages
        return blocks[0].text
    if message.role == "assistant":
        results = {
            block.tool_use_id
            for block in (() if answer is None else answer.blocks)
            if isinstance(block, ToolResult)
        }
        served = {block.extra.get("tool_use_id") for block in blocks if isinstance(block, Other)}
        calls = [block for block in blocks if isinstance(block, ToolUse) and block.id in results]
        blocks = tuple(
            block
            for block in blocks
            if (isinstance(block, Text) and block.text)
            or block in calls
            or (isinstance(block, Thinking) and calls and block.signature)
            or (isinstance(block, RedactedThinking) and calls)
            or (
                isinstance(block, Other)
                and (block.type != "server_tool_use" or block.extra.get("id") in served)
            )
        )
    if all(isinstance(block, Text) for block in blocks):
        return message.text
    return [dump_block(block) for block in blocks]


def _set_breakpoints(body: dict[str, Any]) -> None:
    """Set the breakpoints of the prompt cache.

    The API writes the cache at each breakpoint, and reads it at a breakpoint or at one of the 20
    blocks up to it. The breakpoint at the end finds the entry that the previous request wrote,
    unless many prompts without a reply are in between: the requests of those prompts may have ended
    before the API wrote anything. Then one more breakpoint is set where the last request with a
    reply ended. A long system prompt has a breakpoint of its own, for other conversations.

    https://platform.claude.com/docs/en/build-with-claude/prompt-caching
    """
    body["cache_control"] = _CACHED
    if tokens_in(system := body.get("system", "")) >= MIN_CACHED:
        body["system"] = [{"type": "text", "text": system, "cache_control": _CACHED}]
    messages = body["messages"]
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    asked = replies[-1] - 1 if replies else -1
    if 0 <= asked < len(messages) - LOOK_BACK:
        content = messages[asked]["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        messages[asked]["content"] = [*content[:-1], content[-1] | {"cache_control": _CACHED}]
