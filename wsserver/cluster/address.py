"""Addresses of Redis: one server, or the server that Sentinels name.

https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/
"""

from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from wsserver.errors import MALFORMED_ADDRESS, ConfigError

try:
    from redis import exceptions
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel
    from redis.backoff import NoBackoff
except ImportError:
    raise ConfigError("cluster: the package redis is missing; install wsserver[cluster]") from None

SENTINEL = "+sentinel"  # end of the scheme of an address of Sentinels
SENTINEL_PORT = 26379
FORM = "redis+sentinel://USER:PASSWORD@HOST:26379,HOST:26379/SERVICE/0"


def client(url: str, timeout: float, name: str) -> Redis:
    """Return a client of Redis, which connects when it is used.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, as redis-py reads it, or
            ``redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE/DATABASE`` with
            ``rediss`` for TLS. User and password are for Redis; ``?sentinel_username=…`` and
            ``&sentinel_password=…`` are for the Sentinels, and the other options as for one server.
        timeout: seconds to connect, and for an answer.
        name: name of the connections in Redis.

    Raises:
        ConfigError: the address is malformed.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "protocol": 2,
        # A repeated PUBLISH would double the messages. The bus connects again itself.
        "retry": Retry(NoBackoff(), 0),
        "client_name": name,
        "driver_info": None,  # Redis before 7.2 has no CLIENT SETINFO
    }
    parts = _parts(url)
    try:
        if parts.scheme.endswith(SENTINEL):
            redis = _behind_sentinels(parts, options)
        else:
            _port(parts)
            redis = Redis.from_url(url, **options)
        redis.connection_pool.make_connection()  # type: ignore[no-untyped-call] # checks options
    except TypeError as error:  # "… got an unexpected keyword argument 'x'"
        raise ConfigError(f"cluster: unknown option {str(error).split()[-1]}") from None
    except (ValueError, exceptions.RedisError) as error:
        raise ConfigError(f"cluster: {error}") from None
    return redis


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise ConfigError(f"cluster: {MALFORMED_ADDRESS}") from None


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:  # such as a part of the password in place of the port
        raise ValueError(MALFORMED_ADDRESS) from None


def _behind_sentinels(parts: SplitResult, options: dict[str, Any]) -> Redis:
    """Return a client of the server that Sentinels name as the primary of a service.

    Raises:
        ValueError: the address is malformed.
    """
    login, _, places = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    if not (service and places and (database or "0").isdigit()):
        raise ValueError(f"an address of Sentinels is written {FORM}")
    for_sentinels = {key: options[key] for key in ("socket_timeout", "socket_connect_timeout")}
    given: dict[str, Any] = {}
    if parts.scheme == f"rediss{SENTINEL}":
        given["ssl"] = for_sentinels["ssl"] = True
    for key, value in parse_qsl(parts.query, strict_parsing=True):
        if key.startswith("sentinel_"):
            for_sentinels[key.removeprefix("sentinel_")] = value
        elif key.startswith("ssl_"):
            given[key] = for_sentinels[key] = value
        else:
            raise ValueError(f"unknown option {key!r}")
    user, _, password = login.partition(":")
    sentinels = [_place(place) for place in places.split(",")]
    found = Sentinel(sentinels, sentinel_kwargs=for_sentinels)  # type: ignore[no-untyped-call]
    return found.master_for(  # type: ignore[no-any-return]
        service,
        username=unquote(user) or None,
        password=unquote(password) or None,
        db=int(database or 0),
        **options,
        **given,
    )


def _place(text: str) -> tuple[str, int]:
    """Return host and port of a Sentinel."""
    parts = _parts(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"an address of Sentinels is written {FORM}")
    return parts.hostname, _port(parts) or SENTINEL_PORT
