"""One attempt at a reply: from the events of an API to pieces, usage and an end."""

import io
import itertools
import json
import re
from typing import Any, ClassVar

from wsserver.content import Thinking, Usage
from wsserver.errors import Code, ModelError
from wsserver.generation import End
from wsserver.models.base import Output, Take
from wsserver.models.events import Events, parse
from wsserver.models.failures import TransientError
from wsserver.pieces import Piece
from wsserver.text import well_formed

MAX_INPUT = 4_194_304  # characters of a tool's input


class Reply:
    """Parses the events of one attempt. The text of one read becomes one piece.

    A subclass knows the events of an API. Nearly every event of a reply matches ``plain``, whose
    only group is text without escapes. One match costs a fifth of the time of parsing the fields
    and the JSON; an event that does not match is parsed.

    Args:
        take: called with each piece.
        limit: output tokens at most.
        spent: usage of the earlier attempts, which is added to the usage of this one.
    """

    plain: ClassVar[re.Pattern[bytes]]

    def __init__(self, take: Take, limit: int, spent: Usage | None) -> None:
        self.begun = False  # whether there was any text
        # Usage so far, including the earlier attempts; None if no attempt reported any.
        self.spent = spent
        self.take = take  # gets the pieces
        self.limit = limit
        self.usage = Usage(estimated=True)  # of this attempt
        self.found: list[Output] = []  # parsed, and not yet passed on
        self.end: End | None = None
        self._before = spent
        self._events = Events()

    def receive(self, event: Any) -> None:
        """Parse the JSON of an event.

        Raises:
            ModelError: the event is an error, or the model refused.
            TransientError: the same failures, if a new attempt may succeed.
            LookupError, ValueError, TypeError, AttributeError: the event is malformed.
        """
        raise NotImplementedError

    def receive_data(self, data: bytes) -> None:
        """Parse the data of an event; see :meth:`receive`."""
        self.receive(parse(data))

    def feed(self, chunk: bytes) -> bool:
        """Parse bytes of the body, and return whether the reply is complete.

        Raises:
            ModelError: an event is an error or malformed, or the model refused.
            TransientError: the same failures, if a new attempt may succeed.
        """
        try:
            for event in self._events.feed(chunk):
                if self.end is not None:  # nothing belongs to the reply after its end
                    break
                if (plain := self.plain.fullmatch(event)) is not None:
                    self.found.append(plain[1].decode())
                elif data := Events.data(event):
                    self.receive_data(data)
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ModelError(Code.MALFORMED) from error
        finally:  # the text before a failure counts
            self._hand_on()
        return self.end is not None

    def finish(self) -> End:
        """Return the end of the reply, whose body has ended.

        Raises:
            TransientError: the body ended before the reply did.
        """
        if self.end is None:
            raise TransientError(ModelError(Code.INCOMPLETE))
        return self.end

    def close(self) -> None:
        """Complete the usage of a reply that may end early."""

    def total(self) -> Usage:
        """Add this attempt's usage to the usage of the attempts before it."""
        now = self.usage
        self.spent = now if self._before is None else self._before.plus(now)
        return self.spent

    def _hand_on(self) -> None:
        """Pass the parsed values to ``take``; join neighbouring texts of one kind."""
        found, self.found = self.found, []
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


class ToolInput:
    """The JSON of a tool's input, which arrives in parts."""

    def __init__(self) -> None:
        self._text = io.StringIO()  # small parts in a list would take many times their size

    def add(self, part: str) -> None:
        """Add a part.

        Raises:
            ValueError: the input is too long.
        """
        self._text.write(part)
        if self._text.tell() > MAX_INPUT:
            raise ValueError("a tool's input is too long")

    def parse(self) -> Any:
        """Return the value of the JSON; None if there was none.

        Raises:
            ValueError: the input is not JSON.
        """
        text = self._text.getvalue()
        return parse(text.encode(errors="surrogatepass")) if text else None


def whole(value: Any) -> Any:
    """Return a JSON value whose texts are valid UTF-8; see :func:`well_formed`."""
    return json.loads(well_formed(json.dumps(value, ensure_ascii=False)))
