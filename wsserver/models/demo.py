"""The demo model: it needs neither a network nor a key."""

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Iterator

from wsserver.content import Thinking, Usage
from wsserver.generation import End
from wsserver.models.base import Request

_REMEMBER = re.compile(r"what did i (just )?say", re.IGNORECASE)
_COUNT = re.compile(
    r"\bcount (?:up )?to (?:an? |one )?(\d[\d,]{0,8}|hundred|thousand|million)", re.IGNORECASE
)
_THINK = re.compile(r"\bthink\b", re.IGNORECASE)
_NUMBERS = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_ROWS = 5  # of the table


class Demo:
    """Answers with facts about the prompt, word by word. The same prompt has the same answer.

    A prompt with "count to 1000" gets these numbers, and one with "think" gets thinking first.

    Args:
        rate: words per second; 0 for no pauses.
    """

    name = "demo"

    def __init__(self, rate: float = 25.0) -> None:
        self._pause = 1 / rate if rate else 0.0

    async def __call__(self, request: Request, /) -> AsyncGenerator[str | Thinking | Usage | End]:
        """Yield the answer word by word."""
        asked = sum(_count(message.text) for message in request.messages)
        usage = Usage(input_tokens=asked)
        yield usage
        for number, word in enumerate(_answer(request), start=1):
            if number > request.max_tokens:
                yield End("max_tokens")
                return
            await asyncio.sleep(self._pause)
            yield usage.but(output_tokens=number)
            yield word
        yield End("end_turn")


def _count(text: str) -> int:
    return len(text.split())


def _words(text: str) -> Iterator[str]:
    """Yield the words of a text, each with the space before it."""
    return (match[0] for match in re.finditer(r"\s*\S+", text))


def _answer(request: Request) -> Iterator[str | Thinking]:
    prompt = request.prompt
    if _REMEMBER.search(prompt):
        yield from _words(_remembered(request))
    elif found := _COUNT.search(prompt):
        number = found[1].lower().replace(",", "")
        last = _NUMBERS.get(number) or int(number)
        yield "1"
        yield from (f", {number}" for number in range(2, last + 1))
    else:
        if _THINK.search(prompt):
            yield from map(Thinking, _words(_thoughts(prompt)))
        yield from _words(_facts(prompt))


def _facts(prompt: str) -> str:
    quoted = " ".join(prompt.split())
    count = _count(quoted)
    rows = [word for word in dict.fromkeys(re.findall(r"[^\W_]+", quoted)) if len(word) > 1]
    table = "\n".join(f"| {word} | {len(word)} | {word[::-1]} |" for word in rows[:_ROWS])
    return f"""\
This is the demo model: no language model is connected, so what follows is made from your own \
words. You wrote: “{quoted}”

That is {count} {"word" if count == 1 else "words"} and {len(quoted)} characters.

| word | letters | backwards |
|---|---:|---|
{table}

The number of orders of {count} different {"word" if count == 1 else "words"} is

$$ {_orders(count)} $$

Each word arrives as a frame of its own over the \
[WebSocket](https://www.rfc-editor.org/rfc/rfc6455) that carried your prompt. This is a \
complete client:

```js
const ws = new WebSocket('ws://localhost:3001')
ws.onmessage = e => {{ const f = JSON.parse(e.data); if (f.type === 'token') append(f.text) }}
ws.send(JSON.stringify({{ prompt }}))            // after `open`; … and later:
ws.send(JSON.stringify({{ type: 'stop' }}))
```

Try these:

1. **“Count to a thousand”**, and press *Stop*, or Ctrl-C in a terminal. The server cancels the \
reply at its source and keeps the text. Its last frame says who stopped the reply.
2. **“Think about tea”**: the thinking of a model is shown apart from its answer.
3. **“What did I just say?”**: the conversation is saved.

A real model costs money for each word, so a stop saves money. To talk to Ollama, \
OpenAI and others, use `--model openai:NAME`. To talk to Claude, set `ANTHROPIC_API_KEY` and start \
the server again."""


def _orders(count: int) -> str:
    """Return a formula for the factorial of a number."""
    if count <= 1:
        return f"{count}! = 1"
    value = math.lgamma(count + 1) / math.log(10)
    product = rf"{count}! = \prod_{{k=1}}^{{{count}}} k"
    if value < 7:  # noqa: PLR2004 - a number that people can read
        return f"{product} = {math.factorial(count)}"
    return rf"{product} \approx {10 ** (value % 1):.2f} \times 10^{{{int(value)}}}"


def _thoughts(prompt: str) -> str:
    words = prompt.split()
    return f"""\
The prompt has {len(words)} {"word" if len(words) == 1 else "words"}. The longest one is \
“{max(words, key=len)}”. A language model would plan its answer here, and a client may show these \
thoughts or hide them. I am the demo model, so I have only one plan: I repeat the prompt, I count \
its words, and I show a table, a formula, a link and some code."""


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
