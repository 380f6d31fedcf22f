"""One reply of Chat Completions: from its chunks to pieces, usage and an end.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

import re
from collections.abc import Iterable
from typing import Any

from wsserver.content import Thinking, ToolUse, Usage
from wsserver.errors import Code, ModelError
from wsserver.generation import End
from wsserver.models.base import Output, Take
from wsserver.models.failures import TransientError
from wsserver.models.openai.failures import of_event
from wsserver.models.openai.tags import Tags
from wsserver.models.reply import MAX_INPUT, Reply, ToolInput, whole
from wsserver.wire import text_of

DONE = b"[DONE]"
CALL = 1024  # characters that a call of a tool counts besides its texts

# The deltas with reasoning: DeepSeek and llama.cpp use the first name, vLLM, Ollama and OpenRouter
# the second. A server that sends both sends the same text twice.
_REASONING = ("reasoning_content", "reasoning")
_REASONS = {
    "stop": "end_turn",
    "eos": "end_turn",
    "eos_token": "end_turn",  # Text Generation Inference
    "length": "max_tokens",
    "model_length": "max_tokens",  # Mistral
    "tool_calls": "tool_use",
    "function_call": "tool_use",
}
# The server gave the reply up: vLLM, DeepSeek.
_BROKEN = ("abort", "insufficient_system_resource")


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
        self._tags = Tags()
        self._tools: list[_Tool] = []
        self._latest: dict[object, _Tool] = {}  # the last call of each index
        self._room = MAX_INPUT  # characters of all calls of tools

    def receive_data(self, data: bytes) -> None:
        """Parse the data of an event; see :meth:`Reply.receive`."""
        if data.strip() == DONE:
            self._stop()
        else:
            super().receive_data(data)

    def receive(self, event: Any) -> None:
        """Parse a chunk; see :meth:`Reply.receive`."""
        if (error := event.get("error")) is not None:
            raise of_event(error)
        if event.get("object") == "error":  # older versions of vLLM
            raise of_event(event)
        for choice in event.get("choices") or ():
            self._delta(choice.get("delta") or {})
            # Some servers send an empty reason in each chunk before the last.
            if reason := choice.get("finish_reason"):
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
            self._hand_on()
        return super().finish()

    def _hand_on(self) -> None:
        if not self._tags.over:
            self.found = [part for given in self.found for part in self._separated(given)]
            if self._reason is not None:
                self.found += self._tags.flush()
        super()._hand_on()

    def _separated(self, given: Output) -> Iterable[Output]:
        if self._tags.over or not isinstance(given, str):
            return [given]
        return self._tags.feed(given)

    def _delta(self, delta: dict[str, Any]) -> None:
        thought = next((delta[name] for name in _REASONING if delta.get(name)), None)
        if thought is not None:
            self.found.append(Thinking(text_of(thought)))
        # A refusal is the text of the model that declines.
        content = delta.get("content") or delta.get("refusal") or ""
        if isinstance(content, list):  # Mistral
            self.found += map(_part, content)
        else:
            self.found.append(text_of(content))
        for call in delta.get("tool_calls") or ():
            self._call(call)

    def _call(self, call: dict[str, Any]) -> None:
        """Add a part of a call of a tool.

        Raises:
            ValueError: all calls together are too long.
        """
        index, name = call.get("index"), text_of(call.get("id") or "")
        tool = self._latest.get(index)
        if index is None and not name and self._tools:
            tool = self._tools[-1]
        # Gemini sends no index; some servers send 0 for each call.
        if tool is None or not tool.accepts(name):
            tool = self._latest[index] = _Tool()
            self._tools.append(tool)
            self._room -= CALL
        self._room -= tool.add(call)
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
        if reason in _BROKEN:
            raise TransientError(ModelError(Code.INCOMPLETE))
        self.found += [tool.block() for tool in self._tools]
        if self._tools and reason == "stop":  # Gemini
            reason = "tool_calls"
        self.end = End(_REASONS.get(str(reason), str(reason)), self.spent)


def _part(part: dict[str, Any]) -> Thinking | str:
    """Return the thinking or the text of a part of a content; no text of any other part."""
    if part.get("type") == "thinking":
        return Thinking("".join(text_of(text.get("text") or "") for text in part["thinking"]))
    return text_of(part.get("text") or "")


class _Tool:
    """A call of a tool, which arrives in parts."""

    def __init__(self) -> None:
        self._id = ""
        self._name = ""
        self._input = ToolInput()

    def accepts(self, name: str) -> bool:
        """Return whether a part with this id belongs to the call. Later parts have none."""
        return not name or not self._id or name == self._id

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
