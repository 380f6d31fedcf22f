"""Dialects: how a log is spoken to one kind of client, one module each."""

from wsserver.dialects.base import Dialect

__all__ = ["Dialect"]
