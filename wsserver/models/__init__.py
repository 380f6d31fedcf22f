"""Models: each turns a request into the pieces of a reply."""

from wsserver.content import Message
from wsserver.models.base import Model, Request, check, close, make, name_of

__all__ = ["Message", "Model", "Request", "check", "close", "make", "name_of"]
