"""The demo model: it needs neither a network nor a key."""

import asyncio
import re
from collections.abc import AsyncGenerator

from wsserver.content import Usage
from wsserver.generation import End
from wsserver.models.base import Request


class Demo:
    """Answers with facts about the prompt, word by word. The same prompt has the same answer.

    Args:
        rate: words per second; 0 for no pauses.
    """

    name = "demo"

    def __init__(self, rate: float = 25.0) -> None:
        self._pause = 1 / rate if rate else 0.0

    async def __call__(self, request: Request, /) -> AsyncGenerator[str | Usage | End]:
        """Yield the answer word by word."""
        asked = sum(_words(message.text) for message in request.messages)
        usage = Usage(input_tokens=asked)
        yield usage
        words = re.findall(r"\s*\S+", _answer(request))
        for count, word in enumerate(words[: request.max_tokens], start=1):
            await asyncio.sleep(self._pause)
            yield usage.but(output_tokens=count)
            yield word
        yield End("end_turn" if len(words) <= request.max_tokens else "max_tokens")


def _words(text: str) -> int:
    return len(text.split())


def _answer(request: Request) -> str:
    if re.search(r"what did i (just )?say", request.prompt, re.IGNORECASE):
        return _remembered(request)
    quoted = " ".join(request.prompt.split())
    words = quoted.split()
    longest = max(words, key=len, default="")
    return f"""\
This is the demo model: no language model is connected, so what follows is made from your own \
words. You wrote: “{quoted}”

That is {len(words)} {"word" if len(words) == 1 else "words"} and {len(quoted)} characters. The \
longest of them is “{longest}”; read backwards it is “{longest[::-1]}”.

Each word arrives as a frame of its own over the WebSocket that carried your prompt, at about the \
pace at which people read. A real model would be using its API now, and you would be paying for \
every word. So this is a good moment to press Stop: the server cancels the generation at its \
source, keeps what was said, and tells you with one last frame that it was stopped and by whom. \
The next prompt goes on in the same conversation over the same socket. If you would rather let \
it run, it counts to twenty first: one, two, three, four, five, six, seven, eight, nine, ten, \
eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty.

You can also ask “What did I just say?”, because the conversation is saved. To talk to Claude \
instead, set ANTHROPIC_API_KEY and start the server again."""


def _remembered(request: Request) -> str:
    said = [message for message in request.messages[:-1] if message.role == "user"]
    if not said:
        return "You have not said anything before this. This is the demo model; try it again now."
    before = " ".join(said[-1].text.split())
    answer = f"You said: “{before}”"
    last = request.messages[-2]
    if last.role == "assistant" and last.partial:
        answer += " My answer to it was cut short after “" + " ".join(last.text.split()[-5:]) + "”."
    return answer
