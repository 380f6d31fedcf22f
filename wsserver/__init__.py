"""A WebSocket chat server for streaming language models, with a mid-stream stop."""

import sys

if sys.platform == "win32":
    raise ImportError("wsserver runs on Linux and macOS; on Windows run it in WSL")

from wsserver.asgi_app import Asgi, asgi
from wsserver.auth import ANONYMOUS, Authenticator, Handshake, Principal, Unavailable
from wsserver.content import Message, Thinking, Usage
from wsserver.errors import Code, ConfigError, ModelError
from wsserver.generation import End
from wsserver.models.base import Model, PushModel, Request
from wsserver.server import Server, serve
from wsserver.settings import Settings

__all__ = [
    "ANONYMOUS",
    "Asgi",
    "Authenticator",
    "Code",
    "ConfigError",
    "End",
    "Handshake",
    "Message",
    "Model",
    "ModelError",
    "Principal",
    "PushModel",
    "Request",
    "Server",
    "Settings",
    "Thinking",
    "Unavailable",
    "Usage",
    "asgi",
    "serve",
]

__version__ = "0.1.0"
