"""Dialects: each module encodes a log for one kind of client."""

from wsserver.dialects.base import Dialect, StreamDialect

__all__ = ["Dialect", "StreamDialect"]
