"""Titles of new conversations, written by a model after the first reply."""

import asyncio
import re

from wsserver.content import Message
from wsserver.errors import Refused, StoreError
from wsserver.generation import Log
from wsserver.hub.conversations import Conversations
from wsserver.hub.live import Generation
from wsserver.hub.scheduling import Scheduler
from wsserver.logs import log
from wsserver.models.base import Model, PushModel
from wsserver.protocol import Done, Prompt, Terminal
from wsserver.settings import Settings
from wsserver.stores.base import shorten

SYSTEM = (
    "You write titles for a list of conversations. Answer with the title only: at most six words, "
    "in the language of the question, specific enough to tell the conversation from others about "
    "the same topic. No quotation marks, no full stop, no Markdown."
)
QUESTION = 1500  # characters of the prompt that the model gets
REPLY = 1000  # characters of the reply that the model gets
MAX_TOKENS = 300  # a title has about ten; some models think before they write
HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and characters that change the writing direction."""
ON, OFF = "on", "off"


class Titles:
    """Asks a model for the title of each new conversation, with one short request.

    The request is a generation outside of conversations. So it counts for the principal's limits
    and budgets, and it does not delay a reply. No request is sent if the limits would then refuse
    the next prompt, or if the conversation already has another title. Until the request has ended,
    and if it fails, the title is the first words of the prompt. A title that a client gave stays.

    Args:
        model: the model of the server.
        settings: which model writes titles.
        scheduler: accepts the request.
        conversations: have the titles.
    """

    def __init__(
        self,
        model: Model | PushModel,
        settings: Settings,
        scheduler: Scheduler,
        conversations: Conversations,
    ) -> None:
        wanted = settings.titles or (ON if getattr(model, "writes_titles", False) else OFF)
        self._enabled = wanted != OFF
        self._model = None if wanted == ON else wanted  # None: the model of the reply
        self._scheduler = scheduler
        self._conversations = conversations
        self._tasks: set[asyncio.Task[None]] = set()

    def turn_ended(self, generation: Generation) -> None:
        """Ask for a title, if this was the first whole reply of a conversation."""
        conversation = generation.conversation
        if not self._enabled or conversation is None or conversation.renamed:
            return
        whole = [turn for turn in conversation.turns if turn.partial is None]
        first = conversation.turns[:1]
        if [turn.id for turn in whole] != [generation.id] or first[0].number != 1:
            return
        task = asyncio.get_running_loop().create_task(self._entitle(generation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop the requests for titles. Idempotent."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _entitle(self, generation: Generation) -> None:
        """Ask for the title of a conversation, and set it. A failure leaves the title as it is."""
        conversation = generation.conversation
        assert conversation is not None
        replaced = shorten(conversation.turns[0].prompt.text)
        try:
            if not await self._conversations.lacks_title(
                conversation.owner, conversation.id, replaced
            ):
                return
            asked = await self._scheduler.accept_own(
                self._prompt(generation), generation.owner, generation.account
            )
            try:
                title = title_in(await _text_of(asked.log))
            finally:  # at a shutdown
                self._scheduler.runner.stop(asked, "shutdown")
            if title and title != replaced:
                await self._conversations.entitle(
                    conversation.owner, conversation.id, title, replaced
                )
                log.info("title", id=asked.id, conversation=conversation.id)
        except (Refused, StoreError) as error:
            log.info("no title", conversation=conversation.id, reason=str(error))
        except Exception as error:  # noqa: BLE001
            log.error("no title", conversation=conversation.id, failure=error)

    def _prompt(self, generation: Generation) -> Prompt:
        question = generation.prompt.new_messages[0].text[:QUESTION]
        text = f"Question:\n{question}\n\nReply:\n{generation.log.text[:REPLY]}\n\nTitle:"
        return Prompt(
            messages=[Message("user", text)],
            model=self._model or generation.prompt.model,
            system=SYSTEM,
            max_tokens=MAX_TOKENS,
        )


def title_in(text: str) -> str:
    """Return the title in the answer of a model: its first line, without quotes and Markdown.

    A thought in the text is no title, and a line such as "Here is a title:" is none.
    """
    text = re.sub(r"^\s*<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if not line.rstrip(" *_").endswith(":")), "")
    line = HIDDEN.sub(" ", line)
    line = re.sub(r"^[\s#>*_`-]*(title:)?", "", line, flags=re.IGNORECASE)
    return shorten(line.strip(" \t*_`\"'“”„«».:"))


async def _text_of(asked: Log[Terminal]) -> str:
    """Return the text of a reply after its end; no text if the reply failed or was cut."""
    ended = _Ended(asked)
    asked.followers.append(ended)
    ended.wake()
    try:
        await ended.future
    finally:
        asked.followers.remove(ended)
    whole = isinstance(asked.terminal, Done) and asked.terminal.reason != "max_tokens"
    return asked.text if whole else ""


class _Ended:
    """Waits for the terminal of a log."""

    def __init__(self, log: Log[Terminal]) -> None:
        self._log = log
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        if self._log.terminal is not None and not self.future.done():
            self.future.set_result(None)
