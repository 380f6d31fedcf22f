"""The limits that a server announces in ``hello``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts on one connection. A limit that the server does not tell is None.

    Attributes:
        message_size: bytes of a frame of the client.
        prompt_size: bytes of a prompt and its system prompt, as UTF-8.
        answer_size: bytes of the largest frame of the server.
        frame_rate: frames per second in the long run.
        frame_burst: frames at once.
        bad_frames: unusable frames in a row before the server closes the connection.
        requests: frames that may wait for an answer.
        generations_per_socket: replies that may run or wait.
        queue_size: prompts that may wait in a conversation.
    """

    message_size: int | None = None
    prompt_size: int | None = None
    answer_size: int | None = None
    frame_rate: float | None = None
    frame_burst: int | None = None
    bad_frames: int | None = None
    requests: int | None = None
    generations_per_socket: int | None = None
    queue_size: int | None = None

    @classmethod
    def of(cls, limits: Mapping[str, Any]) -> Self:
        """Convert the ``limits`` of a ``hello``. Unknown limits are ignored.

        Raises:
            TypeError: a limit is not a number.
        """
        known = {key: limits[key] for key in cls.__slots__ if key in limits}
        if not all(isinstance(value, int | float) for value in known.values()):
            raise TypeError("a limit is not a number")
        return cls(**known)
