"""Divides the file descriptors of the process between connections and replies.

A connection uses one descriptor, and a reply uses another one for its request to the model's API.
Without free descriptors nothing works: no reply, no probe, no store. So the server lowers the
settings before it listens, and each open connection has a spare descriptor for a reply.
"""

import contextlib
import os
import resource

from wsserver.errors import ConfigError
from wsserver.logs import log
from wsserver.settings import Settings

OWN = 20  # for the store, the event loop, a fetch of keys, DNS lookups
SPARE = 16  # connections over the limit, so that a full server still answers probes
OPERATORS = 16  # connections to the port for operators, if there is one
AT_ONCE = 8  # connections that are accepted in one turn of the event loop
LINGERING = 100  # most refused clients that may stay connected until they have read the reason
SHARE = 16  # one of so many descriptors is for a refused client
FEWEST = 8  # least connections of a server


def raise_limit(settings: Settings) -> None:
    """Raise the limit of descriptors to the number that the settings need, if possible.

    Only a program that owns its process may call this: the limit applies to the whole process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _reserved(settings, LINGERING) + settings.connections + settings.generations
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if allowed > soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def fit(settings: Settings) -> Settings:
    """Lower connections and generations to fit the limit of descriptors, and log it.

    Raises:
        ConfigError: the limit is too low for a server.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = limit - _reserved(settings, _share(limit))
    if limit == resource.RLIM_INFINITY or room >= settings.connections + settings.generations:
        return settings
    if room < 2 * FEWEST:
        raise ConfigError(f"{limit} file descriptors are too few; raise the limit (ulimit -n)")
    generations = min(settings.generations, room // 2)
    connections = min(settings.connections, room - generations)
    log.warning(
        "fewer connections and replies, as file descriptors are few; see ulimit -n",
        limit=limit,
        connections=connections,
        generations=generations,
    )
    return settings.model_copy(update={"connections": connections, "generations": generations})


def lingering(settings: Settings) -> int:
    """Return the number of refused clients that may stay connected to read the reason."""
    return _share(settings.connections)


def _share(count: int) -> int:
    return max(FEWEST, min(LINGERING, count // SHARE))


def _reserved(settings: Settings, refused: int) -> int:
    """Return the number of descriptors for everything but connections and replies."""
    operators = 0 if settings.operations_port is None else OPERATORS
    return _open() + OWN + SPARE + operators + AT_ONCE + refused


def _open() -> int:
    """Return the number of open descriptors."""
    try:
        return len(os.listdir("/dev/fd"))  # noqa: PTH208 - names are enough
    except OSError:
        return OWN
