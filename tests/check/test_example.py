"""The check of the deployment in examples/deploy."""

from pathlib import Path

import pytest

from tests.check.conftest import checked
from tests.check.test_direct import make_certificate
from tests.test_deploy import NAME, nginx, serving
from wsserver.doctor.findings import Status

pytestmark = pytest.mark.slow


async def test_deployment_of_examples_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificate(tmp_path, "DNS:localhost", cert="fullchain.pem", key="privkey.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "fullchain.pem"))
    renamed = (f"server_name {NAME}", "server_name localhost")
    async with (
        serving(folder, WSSERVER_MODEL="demo") as behind,
        nginx(folder, tmp_path, renamed) as front,
    ):
        found = await checked(f"wss://localhost:{front.port}/", behind.token)
        plain = await checked(f"ws://localhost:{front.plain}/", behind.token)
    assert found.of(Status.OK) == found.findings.keys() - {"idle"}, found.findings
    assert plain.failed() == {"upgrade", "http"}
    assert "a redirect" in plain.findings["upgrade"].seen
