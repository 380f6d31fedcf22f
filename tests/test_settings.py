import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from wsserver import ConfigError, Settings
from wsserver.settings import SECRETS

ROOT = Path(__file__).parent.parent


def test_every_setting_has_a_description() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_keywords_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSSERVER_PORT", "4000")
    monkeypatch.setenv("WSSERVER_MODELS", "a, b,")
    monkeypatch.setenv("WSSERVER_PROMPT_CACHING", "no")
    assert Settings.load().port == 4000
    assert Settings.load().models == ("a", "b")
    assert Settings.load().prompt_caching is False
    assert Settings.load(port=5000, models=["c"]).port == 5000


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("port", "http", "port: "),
        ("port", 70_000, "port: "),
        ("grace", -1, "grace: "),
        ("grace", "nan", "grace: "),
        ("send_timeout", 0, "send_timeout: "),
        ("generations", 0, "generations: "),
        ("thinking", "a lot", "thinking: adaptive, disabled, or a number from 1024"),
        ("thinking", "1000", "thinking: "),
        ("log_level", "loud", "log_level: debug, info"),
        ("prompt_size", 100_000, "prompt_size must not be over message_size"),
        ("write_buffer", 1_000_000, "max_unsent must be at least"),
        ("host", "", "host: "),
        ("max_tokens", 100_000, "max_tokens must not be over max_tokens_limit"),
        ("thinking", "8192", "thinking must be less than max_tokens"),
        ("jwt_audience", "chat", "jwt_audience and jwt_issuer need jwt_secret or jwt_jwks"),
        ("jwt_issuer", "https://x", "jwt_audience and jwt_issuer need jwt_secret or jwt_jwks"),
        ("memory", 1_000_000, "memory must be at least 128 times history_size"),
        ("message_size", 2**26, "memory must be at least 32 times message_size"),
        ("drain_timeout", 100, "drain_timeout must not be over shutdown_timeout"),
        ("colour", "red", "colour: "),
        ("prices", "my-model=cheap", "is not MODEL=INPUT/OUTPUT"),
        ("unix_socket_mode", "999", "three octal digits"),
        ("write_buffer", 60_000, "max_unsent must be at least"),
    ],
)
def test_invalid_setting_is_one_line_error(name: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Settings.load(**{name: value})
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", SECRETS)
def test_secret_is_read_from_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text(" with spaces \n")
    assert Settings.load().secret(name) == ""
    assert Settings.load(**{name: "given"}).secret(name) == "given"
    monkeypatch.setenv(f"WSSERVER_{name.upper()}_FILE", str(file))
    settings = Settings.load()
    assert settings.secret(name) == " with spaces "
    with pytest.raises(ConfigError, match=f"set one of {name} and {name}_file"):
        Settings.load(**{name: "given"})
    spoils: dict[Callable[[], object], str] = {
        lambda: file.write_bytes(b"\xff"): "not text",
        lambda: file.write_text("\n"): "is empty",
        file.unlink: "No such file",
        file.mkdir: "Is a directory",
    }
    for spoil, says in spoils.items():
        spoil()
        with pytest.raises(ConfigError, match=rf"^{name}_file: .*{says}"):
            settings.secret(name)


def test_error_names_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSSERVER_GRACE", "soon")
    with pytest.raises(ConfigError, match=r"^WSSERVER_GRACE: "):
        Settings.load()
    monkeypatch.delenv("WSSERVER_GRACE")
    monkeypatch.setenv("WSSERVER_MAX_TOKEN", "5")
    with pytest.raises(ConfigError, match=r"^WSSERVER_MAX_TOKEN: there is no such setting"):
        Settings.load()


@pytest.mark.parametrize(
    ("name", "value"),
    [("WSSERVER_PORT_3001_TCP", "tcp://10.0.0.1:3001"), ("WSSERVER_SERVICE_HOST", "10.0.0.1")],
)
def test_kubernetes_service_variable_is_explained(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name}: there is no such setting \(Kubernetes"):
        Settings.load()


@pytest.mark.parametrize("value", ["", "adaptive", "disabled", "1024", "8000"])
def test_thinking_accepts_word_or_budget(value: str) -> None:
    assert Settings.load(thinking=value).thinking == value


def test_log_level_may_be_in_upper_case() -> None:
    assert Settings.load(log_level="DEBUG").log_level == "debug"


def test_import_on_windows_names_supported_systems() -> None:
    program = "import sys; sys.platform = 'win32'; import wsserver"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("runs on Linux and macOS; on Windows run it in WSL\n")


def test_documents_and_metadata_name_same_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    classified = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    (tested,) = re.findall(r"^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert classified == tested.split()
    assert project["requires-python"] == f">={classified[0]}"
    *others, last = classified
    assert f"with Python {', '.join(others)} or {last}" in (ROOT / "README.md").read_text()
    assert not any("Windows" in classifier for classifier in project["classifiers"])
