"""Models: what turns a request into pieces."""

from wsserver.content import Message
from wsserver.models.base import Model, Request, check, close, make, name_of

__all__ = ["Message", "Model", "Request", "check", "close", "make", "name_of"]
