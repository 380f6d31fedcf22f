"""A hub and its clients without sockets."""

import json
from typing import Any

from tests.support.puppet import Puppet, until
from tests.support.yielding import YieldingStore
from wsserver import Settings
from wsserver.admission import Admission
from wsserver.auth import Principal
from wsserver.connections.connection import Connection
from wsserver.generation import State
from wsserver.hub.hub import Hub
from wsserver.hub.live import Conversation, Generation
from wsserver.limits import Memory
from wsserver.protocol import Close, Prompt, Terminal
from wsserver.stores.base import StoredGeneration
from wsserver.telemetry import Metrics

__all__ = ["ACCOUNT", "ONE", "OWNER", "TWO", "Bystander", "Port", "Stand"]

OWNER = "ada"
ACCOUNT = ("principal ada",)
ONE, TWO = "conversation-one", "conversation-two"


class Bystander:
    """A watcher that does nothing."""

    def attach(self, generation: Generation) -> None: ...

    def renamed(self, conversation: Conversation, title: str) -> None: ...

    def drop(self, conversation: Conversation) -> None: ...


class Port:
    """An in-memory transport of a client."""

    def __init__(self) -> None:
        self.writable = True
        self.frames: list[dict[str, Any]] = []
        self.failure: Exception | None = None  # raised by later writes
        self.ended: Close | None = None

    def write(self, frame: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.frames.append(json.loads(frame))

    def end(self, code: Close, reason: str) -> None:
        self.ended = code

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["type"] == kind]

    async def next(self, kind: str, count: int = 1) -> dict[str, Any]:
        """Wait until that many frames of a type have come; return the last one."""
        await until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)[count - 1]


class Stand:
    """A hub with a model that the test controls."""

    def __init__(self, **given: Any) -> None:
        self.puppet = Puppet()
        self.store = YieldingStore(0)
        self.settings = Settings(save_interval=1e-9, **given)
        self.memory = Memory(self.settings.memory)
        self.hub = Hub(self.puppet, self.store, self.settings, Metrics(), self.memory)

    def client(self, owner: str = OWNER) -> tuple[Connection, Port]:
        """Connect a client."""
        visitor = Admission(self.settings, None).arrive("127.0.0.1")
        visitor.principal = Principal(owner)
        port = Port()
        return Connection(port, self.hub, self.settings, visitor), port

    async def prompt(
        self, text: str = "Hello?", conversation: str = ONE, **keys: Any
    ) -> Generation:
        prompt = Prompt(prompt=text, conversation=conversation, **keys)
        return await self.hub.scheduler.accept(prompt, OWNER, ACCOUNT, None, Bystander())

    def fail(self, failure: Exception | None) -> None:
        """Make commits of the store fail; None: let them work again."""
        self.store.failure = failure

    async def terminal(self, name: str, owner: str = OWNER) -> Terminal | None:
        """Return the stored terminal of a generation."""
        stored = await self.store.find(owner, name)
        assert isinstance(stored, StoredGeneration)
        return stored.terminal

    async def ended(self, generation: Generation) -> None:
        await until(lambda: generation.state is State.ENDED)
