"""One reply of the Messages API: from its events to pieces, usage and an end.

https://platform.claude.com/docs/en/build-with-claude/streaming
"""

import json
import re
from time import monotonic
from typing import Any

from wsserver.content import Thinking, Usage, parse_block
from wsserver.errors import Code, ModelError
from wsserver.generation import End
from wsserver.models.anthropic.failures import of_event
from wsserver.models.base import Take
from wsserver.models.failures import TransientError
from wsserver.models.reply import Reply, ToolInput, whole
from wsserver.pieces import Piece
from wsserver.wire import text_of

THINKING_RATE = 60  # tokens a second, about the rate of the API's models

_THINKING_BLOCKS = ("thinking", "redacted_thinking")
_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)


class MessagesReply(Reply):
    """Parses the events of the Messages API."""

    plain = re.compile(
        rb"event: content_block_delta\n"
        rb'data: \{"type": ?"content_block_delta", ?"index": ?\d+, ?'
        rb'"delta": ?\{"type": ?"text_delta", ?"text": ?"([^"\\\x00-\x1f]*)"\} *\}'
    )

    def __init__(self, take: Take, limit: int, spent: Usage | None) -> None:
        super().__init__(take, limit, spent)
        self._thinking_since: float | None = None
        self._thought = 0.0  # seconds
        self._stop_reason: object = None
        self._block: dict[str, Any] | None = None  # the open block, if it is passed on as a whole
        self._input = ToolInput()

    def receive(self, event: Any) -> None:
        """Parse an event; see :meth:`Reply.receive`."""
        match event["type"]:
            case "content_block_delta":
                self._delta(event["delta"], event["index"])
            case "content_block_start":
                self._start_block(event["content_block"], event["index"])
            case "content_block_stop":
                self._stop_block()
            case "message_start":
                self._count(event["message"].get("usage") or {}, estimated=True)
            case "message_delta":
                self._stop_reason = event["delta"].get("stop_reason") or self._stop_reason
                self._count(event.get("usage") or {}, estimated=False)
            case "message_stop":
                self._stop()
            case "error":
                raise of_event(event)
            case _:  # a `ping`, or an unknown event, which clients of the API have to ignore
                pass

    def close(self) -> None:
        """Estimate the usage of a reply that ends before the API reports its counts.

        The API sends a summary of the thinking, or none of it, and bills all of it. Until the API
        reports the count, the time is the only measure of the thinking.
        """
        self._stop_thinking()
        if self._thought and self.usage.estimated:
            tokens = min(round(self._thought * THINKING_RATE), self.limit)
            self.usage = self.usage.but(thinking_tokens=tokens)
            self.take(self.total())

    def _stop_thinking(self) -> None:
        if self._thinking_since is not None:
            self._thought += monotonic() - self._thinking_since
            self._thinking_since = None

    def _start_block(self, block: dict[str, Any], index: int) -> None:
        if block["type"] in _THINKING_BLOCKS:
            self._thinking_since = monotonic()
        if block["type"] == "text":
            self.found.append(Piece("text", index, text_of(block.get("text") or "")))
        elif block["type"] == "thinking":
            self.found.append(Piece("thinking", index, text_of(block.get("thinking") or "")))
        else:
            self._block, self._input = block, ToolInput()
            self.found.append("")

    def _delta(self, delta: dict[str, Any], index: int) -> None:
        match delta["type"]:
            case "text_delta":
                self.found.append(text_of(delta["text"]))
            case "thinking_delta":
                self.found.append(Thinking(text_of(delta["thinking"])))
            case "signature_delta":
                self.found.append(Piece("signature", index, text_of(delta["signature"])))
            case "citations_delta":
                citation = json.dumps(delta["citation"], ensure_ascii=False)
                self.found.append(Piece("citation", index, citation))
            case "input_json_delta":
                self._input.add(text_of(delta["partial_json"]))
                self.found.append("")
            case _:  # an unknown delta only ends the silence
                self.found.append("")

    def _stop_block(self) -> None:
        self._stop_thinking()
        block, self._block = self._block, None
        if block is not None:
            if (given := self._input.parse()) is not None:
                block["input"] = given
            self.found.append(parse_block(whole(block)))

    def _count(self, counts: dict[str, Any], *, estimated: bool) -> None:
        # The counts of `message_delta` are totals. A count that did not change is left out.
        known = {name: int(counts[name]) for name in _COUNTS if counts.get(name) is not None}
        self.usage = self.usage.but(**known, estimated=estimated)
        self.found.append(self.total())

    def _stop(self) -> None:
        if self._stop_reason is None:
            raise TransientError(ModelError(Code.INCOMPLETE))
        if not isinstance(self._stop_reason, str):
            raise TypeError("the stop reason is not a text")
        if self._stop_reason == "refusal":
            raise ModelError(Code.REFUSAL)
        self.end = End(self._stop_reason, self.total())
