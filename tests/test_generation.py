import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver.generation import IllegalTransition, Log, State, Thinking, tokens_in, well_formed

EVENTS = {
    "begin": lambda log: log.begin(),
    "append": lambda log: log.append("x"),
    "stop": lambda log: log.stop(),
    "end": lambda log: log.end("terminal"),
}
PATHS = {
    State.QUEUED: [],
    State.RUNNING: ["begin"],
    State.STOPPING: ["begin", "stop"],
    State.ENDED: ["begin", "end"],
}
LEGAL = {
    (State.QUEUED, "begin"): State.RUNNING,
    (State.QUEUED, "stop"): State.STOPPING,
    (State.QUEUED, "end"): State.ENDED,
    (State.RUNNING, "append"): State.RUNNING,
    (State.RUNNING, "stop"): State.STOPPING,
    (State.RUNNING, "end"): State.ENDED,
    (State.STOPPING, "end"): State.ENDED,
}


class Counter:
    def __init__(self) -> None:
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


def running() -> Log[str]:
    log: Log[str] = Log()
    log.begin()
    return log


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_moves_the_state_as_the_table_says_or_changes_nothing(
    state: State, event: str
) -> None:
    log: Log[str] = Log()
    for name in PATHS[state]:
        EVENTS[name](log)
    before = (log.state, list(log.pieces), log.terminal)
    if (state, event) in LEGAL:
        EVENTS[event](log)
        assert log.state is LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransition):
            EVENTS[event](log)
        assert (log.state, log.pieces, log.terminal) == before


def test_followers_are_woken_by_each_piece_and_by_the_terminal_but_not_by_nothing() -> None:
    log, follower = running(), Counter()
    log.followers.append(follower)
    log.append("a")
    log.append("")
    log.append("b")
    assert follower.woken == 2
    log.end("terminal")
    assert follower.woken == 3


def test_a_follower_may_leave_while_it_is_woken() -> None:
    log, stays = running(), Counter()

    class Leaver:
        def wake(self) -> None:
            log.followers.remove(self)

    log.followers += [Leaver(), stays]
    log.append("a")
    assert stays.woken == 1
    assert log.followers == [stays]


def test_a_run_is_of_one_kind() -> None:
    log = running()
    for piece in (Thinking("a"), Thinking("b"), "c", "d", Thinking("e")):
        log.append(piece)
    assert log.read(0, 100) == (2, "ab", True)
    assert log.read(1, 100) == (2, "b", True)
    assert log.read(2, 100) == (4, "cd", False)
    assert log.read(4, 100) == (5, "e", True)
    assert log.text == "cd"


def test_a_run_is_cut_after_the_piece_that_crosses_the_limit() -> None:
    log = running()
    for piece in ("aaa", "bbb", "ccc"):
        log.append(piece)
    assert log.read(0, 4) == (2, "aaabbb", False)
    assert log.read(0, 3) == (1, "aaa", False)
    assert log.read(0, 1) == (1, "aaa", False)


@given(
    st.lists(st.builds(lambda kind, text: kind(text), st.sampled_from([str, Thinking]), st.text())),
    st.integers(0, 20),
    st.integers(1, 20),
)
def test_the_text_after_any_cursor_is_the_same_however_it_is_cut(
    pieces: list[str], after: int, limit: int
) -> None:
    log = running()
    for piece in pieces:
        log.append(piece)
    cursor = min(after, log.seq)
    rest = log.pieces[cursor:]
    runs = []
    while cursor < log.seq:
        run = log.read(cursor, limit)
        assert run.seq > cursor
        cursor = run.seq
        runs.append(run)
    for thinking in (True, False):
        kind = Thinking if thinking else str
        assert "".join(run.text for run in runs if run.thinking is thinking) == "".join(
            piece for piece in rest if type(piece) is kind
        )


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("plain", "plain"),
        ("naïve 😀", "naïve 😀"),
        ("\ud83d\ude00", "😀"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00\ud83d!", "\ufffd\ufffd!"),
    ],
)
def test_text_becomes_what_utf8_can_carry(broken: str, whole: str) -> None:
    assert well_formed(broken) == whole
    kept = well_formed(Thinking(broken))
    assert type(kept) is Thinking
    assert kept == whole


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 0, 0),
        ("a", 1, 1),
        ("some words here and there " * 100, 600, 700),
        ("0123456789" * 100, 300, 400),
        ("if (x[i] != 0) { y += f(x[i]); }\n" * 100, 850, 1300),
        ("Пример текста " * 100, 600, 800),
        ("漢字仮名交じり文" * 250, 2000, 3000),
        ("한국어 문장 " * 100, 500, 800),
        ("😀" * 100, 100, 300),
        ("\ud83d", 1, 3),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_tokens_are_estimated_by_script(text: str, least: int, most: int) -> None:
    assert least <= tokens_in(text) <= most
