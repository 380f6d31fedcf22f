"""Addresses of Redis."""

from typing import Any

import pytest

from wsserver.cluster.address import SENTINEL_PORT, client
from wsserver.errors import ConfigError


def test_options_of_sentinels_and_of_redis_are_told_apart() -> None:
    url = (
        "rediss+sentinel://me:a%40b@one:1,two/chat/2"
        "?sentinel_username=s&sentinel_password=t&ssl_ca_certs=/ca.pem"
    )
    pool: Any = client(url, 2.0, "test").connection_pool
    redis = pool.connection_kwargs
    assert (redis["username"], redis["password"], redis["db"]) == ("me", "a@b", 2)
    assert redis["ssl_ca_certs"] == "/ca.pem"
    sentinels = [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]
    assert [(each["host"], each["port"]) for each in sentinels] == [
        ("one", 1),
        ("two", SENTINEL_PORT),
    ]
    for each in sentinels:
        assert (each["username"], each["password"]) == ("s", "t")
        assert each["ssl_ca_certs"] == "/ca.pem"


@pytest.mark.parametrize("places", [":1", "one,", "one,:2"])
def test_sentinel_without_a_host_is_refused(places: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster: an address of Sentinels is written"):
        client(f"redis+sentinel://{places}/chat", 2.0, "test")


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:geheim/x@127.0.0.1:6379/0",
        "redis+sentinel://me:geheim/x@127.0.0.1:6379/chat/0",
        "redis://me:geheim℀@127.0.0.1:6379/0",
        "redis+sentinel://me:ok@one:geheim/chat",
        "redis://me:geheim@127.0.0.1:6379/0?unknown=1",
        "redis://me:geheim@127.0.0.1:6379/0?ssl_ca_certs=/x",
        "rediss://me:geheim@127.0.0.1:6379/0?ssl_cert_reqs=bogus",
        "redis://me:geheim@127.0.0.1:6379/0?health_check_interval=x",
        "mysql://me:geheim@127.0.0.1/0",
        "me:geheim@127.0.0.1",
    ],
)
def test_malformed_address_is_one_line_error_without_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster: ") as raised:
        client(url, 2.0, "test")
    assert "geheim" not in str(raised.value)
    assert "\n" not in str(raised.value)
