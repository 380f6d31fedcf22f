"""Scripts for a fake of the Chat Completions API: chunks, errors and whole replies, as steps.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

import json
import re
from collections.abc import Mapping, Sequence

from tests.support.script import REQUEST_ID, Answer, Events, Head, Script, Step

__all__ = ["DONE", "LAST", "chunk", "completion", "delta", "failure", "failure_event", "usage"]

DONE = b"data: [DONE]\n\n"
CREATED = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_790_000_000}
COUNTS = {"prompt_tokens": 25, "completion_tokens": 3, "total_tokens": 28}


def data(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def chunk(*choices: object, **keys: object) -> bytes:
    """Return one chunk of a stream."""
    return data({**CREATED, "model": "a-model", "choices": choices, **keys})


def delta(reason: str | None = None, **delta: object) -> bytes:
    """Return a chunk with a delta, as in ``delta(content="Hello")``."""
    return chunk({"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason})


LAST = delta("stop")


def usage(**counts: object) -> bytes:
    """Return the chunk with the usage, which has no choices."""
    return chunk(usage={**COUNTS, **counts})


def failure_event(**keys: object) -> Events:
    """Return an error in a stream, after which the API ends the body."""
    return Events((data({"error": {"message": "No luck", **keys}}),), last=True)


def failure(status: int, headers: Mapping[str, str] | None = None, **keys: object) -> Answer:
    """Return an HTTP error: ``failure(429, code="rate_limit_exceeded")``."""
    body = json.dumps({"error": {"message": "No luck", "type": None, "param": None, **keys}})
    return Answer(status, "application/json", body, {"x-request-id": REQUEST_ID, **(headers or {})})


def completion(
    *parts: str | Sequence[str] | bytes | Step,
    reasoning: str = "",
    reason: str = "stop",
    counts: Mapping[str, object] | None = None,
    interval: float = 0.0,
    chop: int = 0,
    crlf: bool = False,
) -> Script:
    """Return a whole reply. A string is split into words; bytes and steps are sent unchanged."""
    steps: list[Step] = [Head(), Events((delta(role="assistant", content="", refusal=None),))]
    words = re.findall(r"\S+\s*|\s+", reasoning)
    steps.append(Events(tuple(delta(reasoning_content=word) for word in words), interval))
    for part in parts:
        if isinstance(part, Step):
            steps.append(part)
        elif isinstance(part, bytes):
            steps.append(Events((part,)))
        else:
            pieces = re.findall(r"\S+\s*|\s+", part) if isinstance(part, str) else part
            steps.append(Events(tuple(delta(content=piece) for piece in pieces), interval))
    steps.append(Events((delta(reason), usage(**(counts or {})), DONE)))
    return Script(tuple(steps), chop, crlf)
