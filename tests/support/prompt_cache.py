"""A fake of the API's prompt cache and tokenizer.

https://platform.claude.com/docs/en/build-with-claude/prompt-caching
"""

from typing import Any

__all__ = ["PromptCache"]

BREAKPOINTS = 4  # at most, the automatic one included
LOOK_BACK = 20  # blocks at which an entry is looked for, the breakpoint's own included
LEAST = 1024  # tokens of the shortest prefix that is cached

Block = tuple[str, str]  # the role and the text


def tokens(blocks: list[Block]) -> int:
    """Return the tokens of a text: one for each four bytes."""
    return sum(-(-len(text.encode()) // 4) for _, text in blocks)


class PromptCache:
    """Counts the tokens that requests read from the cache, write to it, and send uncached.

    Attributes:
        read: tokens of all requests so far.
        written: likewise.
        uncached: likewise.
    """

    def __init__(self) -> None:
        self.read = self.written = self.uncached = 0
        self._entries: set[int] = set()  # hashes of the prefixes

    @property
    def share(self) -> float:
        """The share of the sent tokens that were read from the cache."""
        return self.read / (self.read + self.written + self.uncached)

    def usage(self, body: dict[str, Any]) -> dict[str, Any]:
        """Count a request; return the input tokens of its usage.

        Raises:
            AssertionError: the API would refuse the request.
        """
        blocks, breakpoints = _blocks(body)
        assert len(breakpoints) <= BREAKPOINTS
        prefixes = [hash(tuple(blocks[:end])) for end in range(len(blocks) + 1)]
        looked_at = {
            end - back for end in breakpoints for back in range(LOOK_BACK) if end - back > 0
        }
        read = max((end for end in looked_at if prefixes[end] in self._entries), default=0)
        written = read
        for end in breakpoints:
            if tokens(blocks[:end]) >= LEAST:
                self._entries.add(prefixes[end])
                written = max(written, end)
        counts = [tokens(part) for part in (blocks[:read], blocks[read:written], blocks[written:])]
        self.read += counts[0]
        self.written += counts[1]
        self.uncached += counts[2]
        return {
            "cache_read_input_tokens": counts[0],
            "cache_creation_input_tokens": counts[1],
            "input_tokens": counts[2],
        }


def _blocks(body: dict[str, Any]) -> tuple[list[Block], list[int]]:
    """Return the content blocks of a request, and the numbers of blocks before its breakpoints."""
    blocks: list[Block] = []
    breakpoints = []
    system = {"role": "system", "content": body.get("system") or []}
    for message in (system, *body["messages"]):
        content = message["content"]
        for block in [{"text": content}] if isinstance(content, str) else content:
            blocks.append((message["role"], block["text"]))
            if "cache_control" in block:
                breakpoints.append(len(blocks))
    if "cache_control" in body:
        breakpoints.append(len(blocks))
    return blocks, breakpoints
