"""The `store` setting."""

from pathlib import Path

import pytest

from tests.stores.support import header, names, whole
from wsserver import Settings
from wsserver.errors import ConfigError
from wsserver.limits import Memory
from wsserver.stores import MemoryStore, make

pytestmark = pytest.mark.slow


async def test_store_setting_chooses_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert isinstance(make(Settings(store="memory:"), Memory(10**9)), MemoryStore)
    for url, path in [
        ("sqlite:///some/where.db", tmp_path / "some/where.db"),
        (f"sqlite:///{tmp_path}/absolute.db", tmp_path / "absolute.db"),
        ("sqlite:///~/chat.db", tmp_path / "home/chat.db"),
        ("sqlite:///what?mode=memory", tmp_path / "what?mode=memory"),
    ]:
        store = make(Settings(store=url), Memory(10**9))
        await store.open()
        await store.close()
        assert path.is_file(), url
    limited = make(Settings(conversations=1), Memory(10**9))
    await limited.commit([whole(header("1", "a")), whole(header("2", "b"))])
    assert await names(limited) == ["b"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "memory://",
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://host/file.db",
        "sqlite:///~nobody-of-this-name/chat.db",
        "sqlite:///a\0b",
        "mysql://host/db",
    ],
)
def test_unknown_store_is_one_line_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^store: ") as raised:
        make(Settings(store=url), Memory(10**9))
    assert "\n" not in str(raised.value)
    assert repr(url) in str(raised.value)
