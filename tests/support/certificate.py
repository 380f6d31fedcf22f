"""A self-signed certificate, which clients trust only if a test configures them to."""

import ssl
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["certificate", "tls_server"]


@cache
def _self_signed() -> tuple[ssl.SSLContext, str]:
    """Return the TLS context of a server, and its certificate as text."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        pem, key = f"{folder}/certificate.pem", f"{folder}/key.pem"
        command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -addext"
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:api.example"
        files = ("-keyout", key, "-out", pem)
        subprocess.run((*command.split(), names, *files), check=True, capture_output=True)
        context.load_cert_chain(pem, key)
        return context, Path(pem).read_text()


def tls_server() -> ssl.SSLContext:
    """Return the TLS context of a server with the self-signed certificate."""
    return _self_signed()[0]


def certificate() -> str:
    """Return the self-signed certificate as text."""
    return _self_signed()[1]
