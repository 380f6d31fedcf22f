"""A running application, whoever owns its sockets."""

from dataclasses import dataclass
from typing import Protocol

from wsserver import Settings
from wsserver.app import App

__all__ = ["Host", "Mounted"]


class Host(Protocol):
    """What tests of replies use of a server; :class:`wsserver.Server` is one."""

    @property
    def url(self) -> str:
        """The address of its WebSocket."""

    @property
    def port(self) -> int:
        """The port on 127.0.0.1."""

    @property
    def settings(self) -> Settings:
        """The settings of the application."""

    @property
    def app(self) -> App:
        """The application."""


@dataclass(frozen=True)
class Mounted:
    """An application of ASGI, under a server that listens on a port."""

    port: int
    settings: Settings
    app: App

    @property
    def url(self) -> str:
        """The address of its WebSocket."""
        return f"ws://127.0.0.1:{self.port}/"
