"""``wsserver check``: connects to a deployment as a client does, and says what does not hold.

The checks use the public protocol only, and send two prompts.
"""

from wsserver.doctor.report import run

__all__ = ["run"]
