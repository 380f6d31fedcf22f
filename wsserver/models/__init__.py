"""Models: what turns a request into pieces."""

from wsserver.models.base import Message, Model, Request, close, load, name_of

__all__ = ["Message", "Model", "Request", "close", "load", "name_of"]
