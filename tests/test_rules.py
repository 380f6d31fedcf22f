"""The protocol's invariants, over random interleavings of all events.

The machine drives the hub and connections over in-memory transports. Prompts, stops, losses,
delays and repeated frames are random, and so are the turns of the event loop between them. The
machine has its own clock, so that a slow computer changes no example.
"""

import asyncio
import json
import secrets
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from tests.support.clock import ClockLoop
from tests.support.puppet import Puppet, Reply, Thinking
from tests.support.yielding import YieldingStore
from wsserver import Code, End, ModelError, Settings, Usage
from wsserver.admission import Admission
from wsserver.auth import ANONYMOUS
from wsserver.connections.connection import Connection
from wsserver.errors import StoreError
from wsserver.generation import Log, State
from wsserver.hub.hub import Hub
from wsserver.hub.live import Generation
from wsserver.limits import Memory
from wsserver.protocol import Terminal
from wsserver.stores.base import StoredGeneration
from wsserver.telemetry import Metrics
from wsserver.text import well_formed

METRICS = Metrics()
TERMINAL = {"done", "error"}
ANSWERS = {"pong", "error", "history", "renamed", "deleted", "closed", "stopped"}
CONVERSATIONS = ["conversation-one", "conversation-two"]

pieces = st.builds(
    lambda kind, text: kind(text),
    st.sampled_from([str, str, Thinking]),
    st.text(st.characters(categories=["L", "Zs", "Cs", "So"]), max_size=5),
)


def joined(said: list[str]) -> list[str]:
    """Join the halves of surrogate pairs that neighbouring pieces of one kind have."""
    whole: list[str] = []
    half = ""
    for piece in filter(None, said):
        if half and type(half) is not type(piece):
            whole.append(type(half)(well_formed(half)))
            half = ""
        kind, text = type(piece), half + piece
        half = kind(text[-1]) if "\ud800" <= text[-1] <= "\udbff" else ""
        whole.append(kind(well_formed(text[:-1] if half else text)))
    return [*whole, type(half)(well_formed(half))]


class FakePort:
    """A client that checks each frame as it gets it."""

    def __init__(self, machine: "Rules") -> None:
        self.machine = machine
        self.writable = True
        self.gone = False
        # By generation: the seq of the last frame after its last `start`; None before the first.
        self.following: dict[str, int | None] = {}
        self.afters: dict[
            str, set[int]
        ] = {}  # by generation: the seqs after which frames may follow a `start`
        self.ended: set[str] = set()
        self.asked: set[str] = set()  # generations that this client prompted or resumed
        self.accepted: set[str] = set()

    def write(self, data: bytes) -> None:
        frame = json.loads(data)
        kind, name = frame["type"], frame.get("id")
        if kind == "start":
            self.machine.note_id(name, frame, self)
            self.accepted.add(name)
            self.ended.discard(name)
            self.following[name] = None
        elif kind in {"token", "thinking"}:
            self.check_text(frame)
        elif kind in TERMINAL and name is not None:
            self.check_terminal(frame)
        else:
            assert kind in ANSWERS
        if kind == "deleted":
            self.machine.note_deleted(frame["conversation"])
        elif kind == "closed":
            self.leave(frame["conversation"])

    def leave(self, conversation: str) -> None:
        """After a `close` only the generations that this client asked for go on."""
        for name in set(self.accepted) - self.asked:
            if self.machine.within(name) == conversation:
                self.following.pop(name, None)
                self.accepted.discard(name)
                self.ended.discard(name)

    def check_text(self, frame: dict[str, Any]) -> None:
        """Rules 1 to 3: text comes between start and terminal, seq grows, no text is changed."""
        assert self.writable, "a client that does not keep up gets no text"
        name, seq = frame["id"], frame["seq"]
        before = self.following[name]
        said = self.machine.said(name)
        befores = {0} | self.afters.get(name, set()) if before is None else {before}
        kind = Thinking if frame["type"] == "thinking" else str
        assert any(
            before < seq <= len(said)
            and all(type(piece) is kind for piece in said[before:seq])
            and "".join(said[before:seq]) == frame["text"]
            for before in befores
        ), "seq grows, and the frame has the model's text up to it"
        self.following[name] = seq

    def check_terminal(self, frame: dict[str, Any]) -> None:
        """Rules 1 and 4: one terminal, after all text, after the close of the model."""
        name = frame["id"]
        seq = self.following.pop(name)  # a second one would fail here
        self.ended.add(name)
        seqs = {0} | self.afters.get(name, set()) if seq is None else {seq}
        assert frame["seq"] in seqs, "the terminal comes after all text"
        reply = self.machine.reply_of(name)
        if reply is not None and reply.said and self.machine.patient:
            assert reply.closed.is_set(), "the model is closed before the terminal"


class Rules(RuleBasedStateMachine):
    """Everything that clients, the network, the model and the store do, in any order."""

    clients = Bundle("clients")
    prompts = Bundle("prompts")
    replies = Bundle("replies")

    def __init__(self) -> None:
        super().__init__()
        self.loop = ClockLoop()
        self.ports: dict[Connection, FakePort] = {}
        self.sent: dict[str, dict[str, Any]] = {}  # by id, or by what stands in for it
        self.stopped_at: dict[Log[Terminal], int] = {}
        self.deleted: list[
            tuple[int, set[str]]
        ] = []  # number of replies before the delete, and the prompts that it deleted

    @initialize(
        grace=st.sampled_from([0.0, 1000.0]),
        frame_size=st.sampled_from([1, 4, 1000]),
        turns=st.integers(0, 3),
        kept=st.sampled_from([1, 1000]),
        patient=st.booleans(),
        tick=st.sampled_from([1e-5, 0.001, 0.3, 2.0]),
    )
    def start(
        self, grace: float, frame_size: int, turns: int, kept: int, *, patient: bool, tick: float
    ) -> None:
        self.loop.tick = tick
        self.patient = patient  # the server waits for each model that is stopped
        self.puppet = Puppet()
        self.settings = Settings(
            grace=grace,
            frame_size=frame_size,
            queue_size=2,
            conversations=kept,
            stop_timeout=1e9 if patient else 5.0,
            save_interval=1e-9,
        )

        self.store = YieldingStore(turns)

        async def make() -> Hub:
            return Hub(
                self.puppet,
                self.store,
                self.settings,
                METRICS,
                Memory(self.settings.memory),
            )

        self.hub = self.loop.run_until_complete(make())

    @property
    def generations(self) -> dict[str, Generation]:
        found = {name: self.hub.known("anonymous", name) for name in self.sent}
        return {name: generation for name, generation in found.items() if generation is not None}

    def call(self, function: Any, *arguments: Any) -> Any:
        """Call inside the event loop, as a transport does."""

        async def run() -> Any:
            return function(*arguments)

        return self.loop.run_until_complete(run())

    def turn(self, turns: int) -> None:
        async def run() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(run())

    def reply_of(self, name: str) -> Reply | None:
        for reply in self.puppet.replies:
            if reply.request.prompt == self.text_of(name):
                return reply
        return None

    def said(self, name: str) -> list[str]:
        """Return the pieces that the log of a reply has at its end."""
        reply = self.reply_of(name)
        size = self.settings.frame_size  # larger pieces are split at this size
        return [
            type(piece)(piece[start : start + size])
            for piece in joined(reply.said if reply else [])
            for start in range(0, len(piece), size)
        ]

    # Clients.

    @rule(target=clients)
    def connect(self) -> Connection:
        port = FakePort(self)
        visitor = Admission(self.settings, None).arrive("127.0.0.1")
        visitor.principal = ANONYMOUS
        connection: Connection = self.call(Connection, port, self.hub, self.settings, visitor)
        self.ports[connection] = port
        return connection

    @rule(
        target=prompts,
        client=clients,
        on_busy=st.sampled_from(["reject", "queue", "interrupt"]),
        conversation=st.sampled_from([None, *CONVERSATIONS]),
        alone=st.booleans(),
        named=st.booleans(),
        retry_of=st.one_of(st.none(), prompts),
    )
    def prompt(
        self,
        client: Connection,
        on_busy: str,
        conversation: str,
        alone: bool,
        named: bool,
        retry_of: str | None,
    ) -> str:
        """Send a prompt. Without an id it can be accepted in the call that reads it."""
        name = secrets.token_urlsafe(16)
        frame: dict[str, Any] = {"id" if named else "request": name, "on_busy": on_busy}
        if alone:
            frame["messages"] = [{"role": "user", "content": f"prompt {name}"}]
        else:
            frame |= {"prompt": f"prompt {name}"}
            frame |= {"conversation": conversation} if conversation else {}
            frame |= {"retry_of": retry_of} if retry_of else {}
        self.sent[name] = frame
        self.send(client, frame)
        return next(other for other in reversed(self.sent) if self.sent[other] is frame)

    @rule(client=clients, name=prompts)
    def send_again(self, client: Connection, name: str) -> None:
        if "id" in self.sent[name]:  # else it would be another prompt
            self.send(client, self.sent[name])

    @rule(client=clients, name=st.one_of(st.none(), prompts))
    def stop(self, client: Connection, name: str | None) -> None:
        known = self.generations.get(name or "")
        self.send(client, {"type": "stop"} | ({"id": name} if name else {}))
        if known is not None:
            assert known.state not in {State.QUEUED, State.RUNNING}, "stop is read at once"
            self.stopped_at.setdefault(known.log, known.log.seq)

    @rule(client=clients, name=prompts, after=st.integers(0, 12))
    def resume(self, client: Connection, name: str, after: int) -> None:
        self.ports[client].afters.setdefault(name, set()).add(after)
        self.send(client, {"type": "resume", "id": name, "after": after})

    @rule(
        client=clients,
        kind=st.sampled_from(["open", "close", "delete", "rename"]),
        conversation=st.sampled_from(CONVERSATIONS),
    )
    def request(self, client: Connection, kind: str, conversation: str) -> None:
        frame = {"type": kind, "conversation": conversation}
        self.send(client, frame | ({"title": "New"} if kind == "rename" else {}))

    @rule(
        conversation=st.sampled_from([*CONVERSATIONS, "new"]),
        kinds=st.lists(
            st.sampled_from(["prompt", "prompt without id", "delete", "open"]), min_size=2
        ),
        turns=st.integers(1, 12),
    )
    def all_at_once(self, conversation: str, kinds: list[str], turns: int) -> None:
        """Several clients send requests about one conversation at the same time."""
        if conversation == "new":
            conversation = secrets.token_urlsafe(16)
        for kind in kinds[:4]:
            client = self.connect()
            if kind.startswith("prompt"):
                named = kind == "prompt"
                self.prompt(client, "reject", conversation, alone=False, named=named, retry_of=None)
            else:
                self.request(client, kind, conversation)
        for _ in range(turns):
            self.turn(1)
            self.a_conversation_runs_one_generation_at_a_time()

    @rule(client=clients)
    def lag(self, client: Connection) -> None:
        self.ports[client].writable = False

    @rule(client=clients)
    def catch_up(self, client: Connection) -> None:
        self.ports[client].writable = not self.ports[client].gone
        self.call(client.wake)

    @rule(client=consumes(clients))
    def disconnect(self, client: Connection) -> None:
        port = self.ports[client]
        port.gone = True
        port.writable = False
        self.call(client.detach)

    def send(self, client: Connection, frame: dict[str, Any]) -> None:
        if "id" in frame and frame.get("type", "prompt") in {"prompt", "resume"}:
            self.ports[client].asked.add(frame["id"])
        self.call(client.receive, json.dumps(frame))

    # The model.

    @rule(target=replies)
    def speak_up(self) -> Any:
        self.turn(2)
        return multiple(*self.puppet.replies[-3:])

    @rule(reply=replies, said=st.lists(pieces, max_size=20))
    def say(self, reply: Reply, said: list[str]) -> None:
        reply.say(*said)

    @rule(reply=replies, counts=st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()))
    def count(self, reply: Reply, counts: tuple[int, int, bool]) -> None:
        reply.say(Usage(counts[0], counts[1], estimated=counts[2]))

    @rule(
        reply=replies,
        how=st.sampled_from(["return", "end", "error", "fault", "nonsense", "stubborn", "slow"]),
    )
    def finish(self, reply: Reply, how: str) -> None:
        if how == "stubborn":
            reply.stubborn = True
        elif how == "slow":
            reply.hold = reply.hold or asyncio.Event()
        elif how == "error":
            reply.fail(ModelError(Code.OVERLOADED))
        elif how == "fault":
            reply.fail(ZeroDivisionError("secret"))
        elif how == "nonsense":
            reply.say(5)  # type: ignore[arg-type]
        else:
            if how == "end":
                reply.say(End("max_tokens", Usage(1, 2)))
            reply.end()

    @rule(reply=replies)
    def close_at_last(self, reply: Reply) -> None:
        if reply.hold is not None:
            reply.hold.set()

    # The store.

    @rule(fails=st.booleans())
    def save(self, fails: bool) -> None:
        self.store.failure = StoreError("disk") if fails else None

    @rule(turns=st.integers(1, 5))
    def go_on(self, turns: int) -> None:
        self.turn(turns)

    @rule(seconds=st.sampled_from([0.5, 6.0, 61.0, 601.0]))
    def let_time_pass(self, seconds: float) -> None:
        """Let the time limits of the store, of a stop, of a reply and of the replay pass."""
        self.loop.now += seconds
        self.turn(1)

    # Invariants.

    @invariant()
    def nothing_is_said_after_a_stop(self) -> None:
        for log, seq in self.stopped_at.items():
            assert log.seq == seq

    @invariant()
    def a_prompt_sent_again_costs_nothing(self) -> None:
        prompts = [reply.request.prompt for reply in getattr(self, "puppet", Puppet()).replies]
        assert len(prompts) == len(set(prompts)), "the model is asked once"

    @invariant()
    def a_conversation_runs_one_generation_at_a_time(self) -> None:
        if not hasattr(self, "hub"):
            return
        going = {State.RUNNING, State.STOPPING, State.SAVING}
        found = [g for g in self.hub.retention if g.state in going and g.began is not None]
        names = [(g.owner, g.conversation_id) for g in found if g.conversation_id is not None]
        assert len(names) == len(set(names))

    @invariant()
    def a_deleted_turn_is_not_shown_to_the_model(self) -> None:
        for before, gone in self.deleted:
            for reply in self.puppet.replies[before:]:
                assert gone.isdisjoint(m.content for m in reply.request.messages)

    def note_deleted(self, conversation: str) -> None:
        """Note the prompts that were accepted in a conversation before its delete."""
        accepted = set().union(*(port.accepted for port in self.ports.values()))
        gone = {self.text_of(name) for name in accepted if self.within(name) == conversation}
        self.deleted.append((len(self.puppet.replies), gone))

    def note_id(self, name: str, start: dict[str, Any], port: FakePort) -> None:
        """Note the id that the server gave to a prompt without one."""
        if name not in self.sent:
            stand_in = start.get("request") or start["prompt"].removeprefix("prompt ")
            self.sent[name] = self.sent[stand_in]
        if start.get("request"):
            port.asked.add(name)

    def text_of(self, name: str) -> str:
        frame = self.sent[name]
        text: str = frame["prompt"] if "prompt" in frame else frame["messages"][0]["content"]
        return text

    def within(self, name: str) -> str | None:
        """Return the conversation that a prompt named."""
        return self.sent[name].get("conversation")

    def teardown(self) -> None:
        if not hasattr(self, "hub"):
            self.loop.close()
            return
        self.store.failure = None
        # At the end each prompt that a client follows gets its terminal.
        for connection, port in self.ports.items():
            if not port.gone:
                port.writable = True
                self.call(connection.wake)
        self.turn(80)  # requests that waited for their client are answered
        for _ in range(len(self.generations) + 1):
            for reply in self.puppet.replies:
                reply.end()
                self.close_at_last(reply)
            self.turn(80)
        for port in self.ports.values():
            if not port.gone:
                assert not port.following, "each accepted prompt gets one terminal"
                assert port.ended == port.accepted
        assert self.hub.live == 0
        for connection in self.ports:
            self.call(connection.detach)
        self.loop.run_until_complete(self.hub.close(1.0))
        self.turn(3)
        for name in set().union(*(port.accepted for port in self.ports.values())):
            found = self.loop.run_until_complete(self.store.find("anonymous", name))
            if isinstance(found, StoredGeneration):
                assert found.terminal is not None, "each end is saved"
        self.loop.close()


class RulesAtLength(Rules):
    """The same with more examples."""


TestRules = Rules.TestCase
TestRules.settings = hypothesis_settings(max_examples=150, stateful_step_count=40)


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestRulesAtLength(RulesAtLength.TestCase):  # type: ignore[misc, valid-type]
    settings = hypothesis_settings(max_examples=2000, stateful_step_count=50)
