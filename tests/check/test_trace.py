"""How the checks judge the times of a reply."""

import pytest

from wsserver.doctor.line import Declined
from wsserver.doctor.trace import Trace, bursts, delay, pace


def trace(*times: float, sent: float = 0.0, began: float = 0.0, ended: float = 2.0) -> Trace:
    """Return a reply whose pieces came at these times."""
    found = Trace()
    for number, _ in enumerate(times, start=1):
        found.take({"type": "token", "id": "x", "seq": number, "text": f"{number} "})
    found.pieces = [
        piece.__class__(at, piece.seq, piece.block, piece.content)
        for at, piece in zip(times, found.pieces, strict=True)
    ]
    found.sent, found.began, found.ended = sent, began, ended
    return found


STEADY = [number / 10 for number in range(20)]


@pytest.mark.parametrize(
    ("times", "seen"),
    [
        (STEADY, None),
        ([at + 0.2 for at in STEADY], None),  # a slow network
        ([2.0] * 20, "0 of 19 pieces"),
        ([], "0 of 19 pieces"),
        ([*[0.2] * 2, *[2.0] * 18], "2 of 19 pieces"),
        ([1.0 if at < 1.0 else 1.79 for at in STEADY], "no piece came for 1.0 s"),
        ([at + at / 4 for at in STEADY], None),  # a busy computer
    ],
)
def test_pieces_that_another_follower_has_show_delay(times: list[float], seen: str | None) -> None:
    found = delay(trace(*times), trace(*STEADY), until=2.0)
    assert (found is None) == (seen is None), found
    assert (seen or "") in (found or "")


def test_pieces_that_come_at_once_show_bursts() -> None:
    clusters = [round(at * 2) / 2 + 0.2 for at in STEADY]
    seen = bursts(trace(*clusters), trace(*STEADY), until=2.5)
    assert seen == "pieces come in bursts: at 5 moments instead of 20"
    assert bursts(trace(*STEADY), trace(*STEADY), until=2.0) is None
    assert bursts(trace(*clusters), trace(*clusters), until=2.5) is None, "the model makes them"


def test_delay_needs_reply_that_lasts() -> None:
    fast = [at / 10 for at in STEADY]
    assert delay(trace(*[0.2] * 20), trace(*fast), until=0.2) is None
    assert delay(trace(2.0), trace(0.0, 1.9), until=2.0) is None


def test_start_that_comes_with_end_shows_buffer() -> None:
    assert trace(began=0.01, ended=2.0).held() is None
    assert trace(began=0.9, ended=0.9).held() is None, "too short to judge"
    assert "2.0 s after the prompt" in (trace(began=1.99, ended=2.0).held() or "")


def test_pace_has_longest_gap() -> None:
    assert pace(trace(0.0, 0.1, 0.5), until=2.0) == "3 frames over 0.5 s, longest gap 400 ms"
    assert pace(trace(0.0, 0.1, 0.2), until=2.0) is None
    assert pace(trace(0.0, 0.1, 2.5), until=2.0) is None


def test_content_is_joined_by_block_after_piece() -> None:
    reply = Trace()
    for seq, (kind, block, key) in enumerate(
        [
            ("thinking", 0, "text"),
            ("token", 1, "text"),
            ("token", 1, "text"),
            ("block", 2, "partial_json"),
        ]
    ):
        reply.take({"type": kind, "id": "x", "seq": seq + 1, "block": block, key: f"{seq}"})
    whole = {("thinking", 0): "0", ("token", 1): "12", ("block", 2): "3"}
    assert reply.content() == whole
    assert reply.content(after=2) == {("token", 1): "2", ("block", 2): "3"}


def test_failed_reply_raises_code() -> None:
    with pytest.raises(Declined, match="overloaded: Try later"):
        Trace().take({"type": "error", "id": "x", "code": "overloaded", "message": "Try later"})
