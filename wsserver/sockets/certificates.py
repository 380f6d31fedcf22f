"""The certificate of the server, and its replacement while the server runs."""

import re
import ssl
from pathlib import Path
from typing import NoReturn

from wsserver.errors import ConfigError
from wsserver.logs import log

# OpenSSL's reasons for a key of another certificate.
MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


class Certificate:
    """A certificate and its key, which can be replaced while the server runs.

    Args:
        cert: PEM file with the certificate and its intermediate certificates.
        key: PEM file with the key; empty if ``cert`` also has the key.

    Raises:
        ConfigError: a file cannot be read, or the key does not belong to the certificate.
    """

    context: ssl.SSLContext  # TLS context of the server; it stays the same over all reloads

    def __init__(self, cert: str, key: str = "") -> None:
        self._cert, self._key = cert, key or cert
        self.context = self._current = self._load()
        # A context keeps one certificate for each kind of key, so a new certificate of another kind
        # would not replace the old one. A reload therefore makes a new context, and each connection
        # chooses the newest. OpenSSL also calls this for clients that send no server name.
        self.context.sni_callback = self._choose

    def reload(self) -> bool:
        """Read the files again, for new connections.

        Returns:
            False if the files could not be used. The old certificate then stays, and the log has
            the reason.
        """
        try:
            self._current = self._load()
        except ConfigError as error:
            log.error("certificate not reloaded", reason=str(error))
            return False
        return True

    def _choose(self, tls: ssl.SSLObject | ssl.SSLSocket, *_: object) -> None:
        tls.context = self._current

    def _load(self) -> ssl.SSLContext:
        # The errors of OpenSSL do not name the file.
        if b"-----BEGIN CERTIFICATE-----" not in _read("cert", self._cert):
            raise ConfigError(f"cert: {self._cert} has no certificate in PEM")
        if not re.search(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----", _read("key", self._key)):
            raise ConfigError(f"key: {self._key} has no private key in PEM")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=self._encrypted)
        except ssl.SSLError as error:
            if error.reason in MISMATCHES:
                raise ConfigError(
                    f"key: {self._key} does not belong to the certificate in {self._cert}"
                ) from None
            reason = (error.reason or "not understood").replace("_", " ").lower()
            raise ConfigError(f"cert: cannot use {self._cert} with {self._key}: {reason}") from None
        except OSError as error:  # the file has changed since it was read
            raise ConfigError(f"cert: cannot read {self._cert}: {error.strerror}") from None
        return context

    def _encrypted(self) -> NoReturn:
        # OpenSSL would otherwise ask for the password at the terminal, and wait.
        raise ConfigError(f"key: {self._key} is encrypted; it has to be without a password")


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{setting}: cannot read {path}: {reason}") from None
