"""File descriptors: how many this process may have, and what they are shared out to.

A connection takes one, and a reply takes another for its request to the model's API. Where a
process has none left, nothing works: no reply, no probe, no store. So the settings are lowered to
what the limit allows before the server listens, and each open connection keeps one for a reply.
"""

import contextlib
import os
import resource

from wsserver.errors import ConfigError
from wsserver.logs import log
from wsserver.settings import Settings

OWN = 20  # the store's, the event loop's, a fetch of keys, names that are looked up
SPARE = 16  # connections beyond the limit, for probes: a full server is not a dead one
OPERATORS = 16  # connections to the port for operators, where there is one
AT_ONCE = 8  # connections that are accepted in one turn of the event loop
LINGERING = 100  # clients who are turned away and read why, where descriptors are many
SHARE = 16  # of how many descriptors one may go to such a client
FEWEST = 8  # connections, below which a server is of no use


def raise_limit(settings: Settings) -> None:
    """Have as many descriptors as the settings may need, or as many as there are.

    For a program that owns its process: the limit is the whole process's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _beside(settings, LINGERING) + settings.connections + settings.generations
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if allowed > soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def fit(settings: Settings) -> Settings:
    """Lower connections and generations to what the limit of descriptors allows, and log it.

    Raises:
        ConfigError: the limit allows next to none.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = limit - _beside(settings, _share(limit))
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
    """Return how many clients who are turned away may stay a moment to read why."""
    return _share(settings.connections)


def _share(count: int) -> int:
    return max(FEWEST, min(LINGERING, count // SHARE))


def _beside(settings: Settings, turned_away: int) -> int:
    """Return how many descriptors are taken by all but connections and replies."""
    operators = 0 if settings.operations_port is None else OPERATORS
    return _open() + OWN + SPARE + operators + AT_ONCE + turned_away


def _open() -> int:
    """Return how many descriptors are open."""
    try:
        return len(os.listdir("/dev/fd"))  # noqa: PTH208 - names are enough
    except OSError:
        return OWN
