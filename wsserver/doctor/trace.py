"""The frames of one reply that one follower got, with their times."""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from wsserver.doctor.line import Declined, Frame, Line
from wsserver.errors import Code

CONTENT = frozenset({"token", "thinking", "block"})
TERMINALS = frozenset({"done", "error"})
LEAST_SPAN = (
    0.3  # seconds of a reply in which a proxy that holds pieces can be told from a fast model
)
LEAST_PIECES = 3
LEAST_REPLY = 1.0  # seconds
HELD = 0.3  # part of the pieces; a follower that has less is behind
BURST = 0.4  # part of the time of a reply; a follower without a piece for so long gets bursts
SLOWER = 3  # times the longest gap of the other follower: else the model or the computer was slow
MOMENT = 0.02  # seconds; pieces that come within come at once
LEAST_MOMENTS = 12  # of the other follower
END = 0.9  # part of the time of a reply; what comes later may come with the end


@dataclass(frozen=True, slots=True)
class Piece:
    """The content of one frame.

    Attributes:
        at: when the frame came, in seconds.
        seq: the seq of the frame.
        block: type of the frame, and index of its block.
        content: text, or JSON.
    """

    at: float
    seq: int
    block: tuple[str, int]
    content: str


class Trace:
    """A reply as one follower got it.

    Attributes:
        pieces: the content so far.
        terminal: the last frame; None before it came.
        sent: when the prompt was sent, in seconds.
        began: when ``start`` came; infinite before.
        ended: when the terminal came; 0 before.
        progress: set at each frame.
    """

    def __init__(self, progress: asyncio.Event | None = None) -> None:
        self.pieces: list[Piece] = []
        self.terminal: Frame | None = None
        self.sent = time.monotonic()
        self.began = float("inf")
        self.ended = 0.0
        self.progress = progress or asyncio.Event()

    def take(self, frame: Frame) -> None:
        """Take a frame of the reply.

        Raises:
            Declined: the reply failed.
            ValueError: the frame has content without its place.
        """
        now, kind = time.monotonic(), frame["type"]
        if kind == "start":
            self.began = min(self.began, now)
        elif kind in CONTENT:
            keys = ("text", "partial_json", "citation", "signature")
            content = "".join(str(frame.get(key, "")) for key in keys)
            seq, block = frame.get("seq"), frame.get("block", 0)
            if not (isinstance(seq, int) and isinstance(block, int)):
                raise ValueError("a piece without a place")
            self.pieces.append(Piece(now, seq, (kind, block), content))
        elif kind in TERMINALS:
            self.terminal, self.ended = frame, now
        self.progress.set()
        if kind == "error":
            raise Declined(frame)

    @property
    def seq(self) -> int:
        """The seq of the last piece."""
        return self.pieces[-1].seq if self.pieces else 0

    def seq_at(self, moment: float) -> int:
        """Return the seq of the last piece that had come at a moment."""
        return max((piece.seq for piece in self.pieces if piece.at <= moment), default=0)

    def longest_gap(self, begin: float, end: float) -> float:
        """Return the longest time without a piece between two moments, in seconds."""
        times = [begin, *(piece.at for piece in self.pieces if begin < piece.at < end), end]
        return max(after - before for before, after in itertools.pairwise(times))

    def held(self) -> str | None:
        """Say whether ``start``, which the server sends at once, came with the end only."""
        taken = self.ended - self.sent
        if taken < LEAST_REPLY or self.began - self.sent < END * taken:
            return None
        return f"everything came at the end, {taken:.1f} s after the prompt"

    def moments(self, until: float) -> int:
        """Return at how many moments pieces came."""
        count, last = 0, float("-inf")
        for piece in self.pieces:
            if last + MOMENT < piece.at <= until:
                count, last = count + 1, piece.at
        return count

    def content(self, after: int = 0) -> Mapping[tuple[str, int], str]:
        """Return the content after a piece, joined by type and block."""
        found: dict[tuple[str, int], str] = defaultdict(str)
        for piece in self.pieces:
            if piece.seq > after:
                found[piece.block] += piece.content
        return found


async def follow(line: Line, reply: str, trace: Trace, most: int | None = None) -> None:
    """Read frames of a reply until its terminal, or until so many have content.

    Raises:
        Declined: the server refused the prompt or the resume, or the reply failed.
        Lost: the connection was lost.
    """
    enough = None if most is None else len(trace.pieces) + most
    while trace.terminal is None and (enough is None or len(trace.pieces) < enough):
        frame = await line.receive()
        if frame.get("id") == reply:
            trace.take(frame)
        elif frame["type"] == "error" and frame.get("code") != Code.NOT_RUNNING:  # a stop was late
            raise Declined(frame)


def delay(own: Trace, other: Trace, until: float) -> str | None:
    """Say how one follower is behind another follower of the same reply.

    Args:
        own: the follower in question.
        other: the follower to compare with; what it has, the server has sent.
        until: when the reply was stopped or ended, in seconds.

    Returns:
        None if both have the pieces at about the same time, or if there is nothing to compare.
    """
    if len(other.pieces) < LEAST_PIECES:
        return None
    first = other.pieces[0].at
    span = (until - first) * END
    if span < LEAST_SPAN:
        return None
    there, here = other.seq_at(first + span), own.seq_at(first + span)
    if here < HELD * there:
        return f"after {span:.1f} s of the reply {here} of {there} pieces had come"
    gap, usual = own.longest_gap(first, first + span), other.longest_gap(first, first + span)
    if gap > BURST * span and gap > SLOWER * usual:
        return f"no piece came for {gap:.1f} s"
    return None


def bursts(own: Trace, other: Trace, until: float) -> str | None:
    """Say whether one follower gets several pieces at once, which another one gets singly."""
    here, there = own.moments(until), other.moments(until)
    if there < LEAST_MOMENTS or SLOWER * here > there:
        return None
    return f"pieces come in bursts: at {here} moments instead of {there}"


def pace(own: Trace, until: float) -> str | None:
    """Describe how the pieces came; None if they came too fast or too few to judge."""
    times = [piece.at for piece in own.pieces if piece.at <= until]
    if len(times) < LEAST_PIECES or times[-1] - times[0] < LEAST_SPAN * END:
        return None
    gap = own.longest_gap(times[0], times[-1])
    return f"{len(times)} frames over {times[-1] - times[0]:.1f} s, longest gap {gap * 1000:.0f} ms"
