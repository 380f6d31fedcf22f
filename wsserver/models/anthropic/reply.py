"""One reply of the Messages API: from its events to pieces, usage and an end.

https://platform.claude.com/docs/en/build-with-claude/streaming
"""

import itertools
import json
from time import monotonic
from typing import Any

from wsserver.content import Thinking, Usage, parse_block
from wsserver.errors import Code, ModelError
from wsserver.generation import End
from wsserver.models.anthropic.events import PLAIN_TEXT, Events, parse
from wsserver.models.anthropic.failures import TransientError, of_event
from wsserver.models.base import Output, Take
from wsserver.pieces import Piece
from wsserver.text import well_formed
from wsserver.wire import text_of

MAX_INPUT = 4_194_304  # characters of a tool's input
THINKING_RATE = 60  # tokens a second, about the rate of the API's models

_THINKING_BLOCKS = ("thinking", "redacted_thinking")
_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)


class Reply:
    """Parses the events of one attempt. The text of one read becomes one piece.

    Args:
        take: called with each piece.
        limit: output tokens at most.
        spent: usage of the earlier attempts, which is added to the usage of this one.
    """

    def __init__(self, take: Take, limit: int, spent: Usage | None) -> None:
        self.begun = False  # whether there was any text
        # Usage so far, including the earlier attempts; None if no attempt reported any.
        self.spent = spent
        self.take = take  # gets the pieces
        self._before = spent
        self._limit = limit
        self._thinking_since: float | None = None
        self._thought = 0.0  # seconds
        self._events = Events()
        self._end: End | None = None
        self._usage = Usage(estimated=True)
        self._stop_reason: object = None
        self._found: list[Output] = []
        self._block: dict[str, Any] | None = None  # the open block, if it is passed on as a whole
        self._input: list[str] = []  # the parts of its JSON
        self._room = 0  # characters that the input may still have

    def feed(self, chunk: bytes) -> bool:
        """Parse bytes of the body, and return whether the reply is complete.

        Raises:
            ModelError: an event is an error or malformed, or the model refused.
            TransientError: the same failures, if a new attempt may succeed.
        """
        try:
            for event in self._events.feed(chunk):
                if self._end is not None:  # nothing belongs to the reply after its end
                    break
                if (plain := PLAIN_TEXT.fullmatch(event)) is not None:
                    self._found.append(plain[1].decode())
                elif data := Events.data(event):
                    self._receive(data)
        except UnicodeDecodeError as error:
            raise ModelError(Code.MALFORMED) from error
        finally:  # the text before a failure counts
            self._hand_on()
        return self._end is not None

    def finish(self) -> End:
        """Return the end of the reply.

        Raises:
            TransientError: the body ended before the reply did.
        """
        if self._end is None:
            raise TransientError(ModelError(Code.INCOMPLETE))
        return self._end

    def close(self) -> None:
        """Estimate the usage of a reply that ends before the API reports its counts.

        The API sends a summary of the thinking, or none of it, and bills all of it. Until the API
        reports the count, the time is the only measure of the thinking.
        """
        self._stop_thinking()
        if self._thought and self._usage.estimated:
            tokens = min(round(self._thought * THINKING_RATE), self._limit)
            self._usage = self._usage.but(thinking_tokens=tokens)
            self.take(self._total())

    def _total(self) -> Usage:
        """Add this attempt's usage to the usage of the attempts before it."""
        now = self._usage
        self.spent = now if self._before is None else self._before.plus(now)
        return self.spent

    def _stop_thinking(self) -> None:
        if self._thinking_since is not None:
            self._thought += monotonic() - self._thinking_since
            self._thinking_since = None

    def _receive(self, data: bytes) -> None:
        try:
            event = parse(data)
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
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ModelError(Code.MALFORMED) from error

    def _start_block(self, block: dict[str, Any], index: int) -> None:
        if block["type"] in _THINKING_BLOCKS:
            self._thinking_since = monotonic()
        if block["type"] == "text":
            self._found.append(Piece("text", index, text_of(block.get("text") or "")))
        elif block["type"] == "thinking":
            self._found.append(Piece("thinking", index, text_of(block.get("thinking") or "")))
        else:
            self._block, self._input, self._room = block, [], MAX_INPUT
            self._found.append("")

    def _delta(self, delta: dict[str, Any], index: int) -> None:
        match delta["type"]:
            case "text_delta":
                self._found.append(text_of(delta["text"]))
            case "thinking_delta":
                self._found.append(Thinking(text_of(delta["thinking"])))
            case "signature_delta":
                self._found.append(Piece("signature", index, text_of(delta["signature"])))
            case "citations_delta":
                citation = json.dumps(delta["citation"], ensure_ascii=False)
                self._found.append(Piece("citation", index, citation))
            case "input_json_delta":
                self._input.append(text_of(delta["partial_json"]))
                self._room -= len(self._input[-1])
                if self._room < 0:
                    raise ValueError("a tool's input is too long")
                self._found.append("")
            case _:  # an unknown delta only ends the silence
                self._found.append("")

    def _stop_block(self) -> None:
        self._stop_thinking()
        block, self._block = self._block, None
        if block is not None:
            if written := "".join(self._input):
                block["input"] = parse(written.encode(errors="surrogatepass"))
            self._found.append(parse_block(_whole(block)))

    def _hand_on(self) -> None:
        """Pass the parsed values to ``take``; join neighbouring texts of one kind."""
        found, self._found = self._found, []
        if len(found) == 1 and type(found[0]) is str:
            self.begun = self.begun or found[0] != ""
            self.take(found[0])
            return
        for kind, items in itertools.groupby(found, type):
            if kind is str:
                text = "".join(items)  # type: ignore[arg-type]
                self.begun = self.begun or text != ""
                self.take(text)
            elif kind is Thinking:
                text = "".join(item.thinking for item in items)  # type: ignore[union-attr]
                self.begun = self.begun or text != ""
                self.take(Thinking(text))
            else:
                for item in items:
                    empty = isinstance(item, Usage) or (isinstance(item, Piece) and not item.data)
                    self.begun = self.begun or not empty
                    self.take(item)

    def _count(self, counts: dict[str, Any], *, estimated: bool) -> None:
        # The counts of `message_delta` are totals. A count that did not change is left out.
        known = {name: int(counts[name]) for name in _COUNTS if counts.get(name) is not None}
        self._usage = self._usage.but(**known, estimated=estimated)
        self._found.append(self._total())

    def _stop(self) -> None:
        if self._stop_reason is None:
            raise TransientError(ModelError(Code.INCOMPLETE))
        if not isinstance(self._stop_reason, str):
            raise TypeError("the stop reason is not a text")
        if self._stop_reason == "refusal":
            raise ModelError(Code.REFUSAL)
        self._end = End(self._stop_reason, self._total())


def _whole(value: Any) -> Any:
    """Return a JSON value whose texts are valid UTF-8; see :func:`well_formed`."""
    return json.loads(well_formed(json.dumps(value, ensure_ascii=False)))
