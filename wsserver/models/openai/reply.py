"""One reply of Chat Completions: from its chunks to pieces, usage and an end.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

import re
from typing import Any

from wsserver.content import Thinking, ToolUse, Usage
from wsserver.errors import Code, ModelError
from wsserver.generation import End
from wsserver.models.base import Take
from wsserver.models.failures import TransientError
from wsserver.models.openai.failures import of_event
from wsserver.models.reply import MAX_INPUT, Reply, ToolInput, whole
from wsserver.wire import text_of

DONE = b"[DONE]"
CALL = 1024  # characters that a call of a tool counts besides its texts

# The deltas with reasoning: DeepSeek and llama.cpp use the first name, vLLM, Ollama and OpenRouter
# the second. A server that sends both sends the same text twice.
_REASONING = ("reasoning_content", "reasoning")
_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
}


class ChatReply(Reply):
    """Parses the chunks of Chat Completions."""

    # A chunk whose delta has only text, with keys before and after `choices` that are no objects.
    plain = re.compile(
        rb'data: ?\{[^{}\[\]]*"choices": ?\[\{"index": ?0, ?"delta": ?'
        rb'\{(?:"role": ?"assistant", ?)?"content": ?"([^"\\\x00-\x1f]*)"\}'
        rb'(?:, ?"logprobs": ?null)?, ?"finish_reason": ?null\}\]'
        rb'(?:, ?"(?:usage|system_fingerprint|obfuscation)": ?(?:null|"[^"\\]*"))*\}'
    )

    def __init__(self, take: Take, limit: int, spent: Usage | None) -> None:
        super().__init__(take, limit, spent)
        self._reason: str | None = None
        self._tools: dict[int, _Tool] = {}
        self._room = MAX_INPUT  # characters of all calls of tools

    def receive_data(self, data: bytes) -> None:
        """Parse the data of an event; see :meth:`Reply.receive`."""
        if data == DONE:
            self._stop()
        else:
            super().receive_data(data)

    def receive(self, event: Any) -> None:
        """Parse a chunk; see :meth:`Reply.receive`."""
        if (error := event.get("error")) is not None:
            raise of_event(error)
        for choice in event.get("choices") or ():
            self._delta(choice.get("delta") or {})
            if (reason := choice.get("finish_reason")) is not None:
                self._reason = text_of(reason)
        if (counts := event.get("usage")) is not None:
            self._count(counts)

    def finish(self) -> End:
        """Return the end of the reply. Some servers end the body without ``[DONE]``.

        Raises:
            ModelError: the model refused, or failed.
            TransientError: the body ended before the reply did.
        """
        if self.end is None and self._reason is not None:
            self._end()
        return super().finish()

    def _delta(self, delta: dict[str, Any]) -> None:
        thought = next((delta[name] for name in _REASONING if delta.get(name)), None)
        if thought is not None:
            self.found.append(Thinking(text_of(thought)))
        # A refusal is the text of the model that declines.
        self.found.append(text_of(delta.get("content") or delta.get("refusal") or ""))
        for call in delta.get("tool_calls") or ():
            self._call(call)

    def _call(self, call: dict[str, Any]) -> None:
        """Add a part of a call of a tool.

        Raises:
            ValueError: all calls together are too long.
        """
        index = int(call.get("index", 0))
        if index not in self._tools:
            self._tools[index] = _Tool()
            self._room -= CALL
        self._room -= self._tools[index].add(call)
        if self._room < 0:
            raise ValueError("the calls of tools are too long")

    def _count(self, counts: dict[str, Any]) -> None:
        given = int(counts.get("prompt_tokens") or 0)
        read = int((counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        output = int(counts.get("completion_tokens") or 0)
        self.usage = Usage(given - read, output, cache_read_input_tokens=read)
        self.found.append(self.total())

    def _stop(self) -> None:
        if self._reason is None:
            raise TransientError(ModelError(Code.INCOMPLETE))
        self._end()

    def _end(self) -> None:
        reason = self._reason
        if reason == "content_filter":
            raise ModelError(Code.REFUSAL)
        if reason == "error":  # OpenRouter, if the chunk has no `error`
            raise TransientError(ModelError(Code.UPSTREAM_ERROR))
        for _, tool in sorted(self._tools.items()):
            self.take(tool.block())
        self.end = End(_REASONS.get(str(reason), str(reason)), self.spent)


class _Tool:
    """A call of a tool, which arrives in parts."""

    def __init__(self) -> None:
        self._id = ""
        self._name = ""
        self._input = ToolInput()

    def add(self, call: dict[str, Any]) -> int:
        """Add a part of the call, and return its characters."""
        function = call.get("function") or {}
        name, given = text_of(call.get("id") or ""), text_of(function.get("arguments") or "")
        tool = text_of(function.get("name") or "")
        self._id, self._name = self._id or name, self._name or tool
        self._input.add(given)
        return len(name) + len(tool) + len(given)

    def block(self) -> ToolUse:
        """Return the whole call.

        Raises:
            ValueError: its input is not a JSON object.
        """
        given = self._input.parse()
        if not isinstance(given or {}, dict):
            raise ValueError("the input of a tool is no object")  # noqa: TRY004
        return ToolUse(whole(self._id), whole(self._name), whole(given or {}))
