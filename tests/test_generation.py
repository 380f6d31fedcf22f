import asyncio

import pytest

from tests.support.pieces import said
from wsserver.content import Usage
from wsserver.generation import TRANSITIONS, End, Event, IllegalTransition, Log, State, state_after
from wsserver.hub.live import Generation
from wsserver.protocol import Done, Prompt
from wsserver.telemetry import Span

LEGAL = {
    (State.QUEUED, "start"): State.RUNNING,
    (State.QUEUED, "stop"): State.STOPPING,
    (State.QUEUED, "restore"): State.ENDED,
    (State.RUNNING, "stop"): State.STOPPING,
    (State.RUNNING, "save"): State.SAVING,
    (State.STOPPING, "save"): State.SAVING,
    (State.SAVING, "end"): State.ENDED,
}


class Counter:
    def __init__(self) -> None:
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", TRANSITIONS)
def test_event_leads_to_state_of_table_or_raises(state: State, event: Event) -> None:
    if (state, event) in LEGAL:
        assert state_after(state, event) is LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransition, match=event):
            state_after(state, event)


@pytest.mark.parametrize(
    ("before", "event"),
    [
        (["start"], "start"),
        (["start", "stop"], "stop"),
        ([], "save"),
        (["start", "save", "end"], "save"),
        (["start"], "end"),
        (["start"], "restore"),
    ],
)
async def test_illegal_event_leaves_generation_unchanged(before: list[str], event: str) -> None:
    task = asyncio.get_running_loop().create_task(asyncio.sleep(0, End()))
    done = Done(id="g", seq=0, reason="end_turn", usage=Usage())
    generation = Generation("g", "me", Prompt(prompt="Hello?"), "m", None)
    events = {
        "start": lambda: generation.start(task, Span(None), 1.0),
        "stop": lambda: generation.stop("client", 2.0),
        "save": lambda: generation.save(End(), 3.0),
        "end": lambda: generation.end(done),
        "restore": lambda: generation.restore(done),
    }
    for name in before:
        events[name]()
    facts = {name: getattr(generation, name) for name in Generation.__slots__}
    with pytest.raises(IllegalTransition):
        events[event]()
    assert {name: getattr(generation, name) for name in Generation.__slots__} == facts
    await task


def test_closed_log_refuses_pieces_and_second_terminal() -> None:
    log: Log[str] = Log()
    log.append("a")
    log.end("terminal")
    for illegal in (log.append, log.end):
        with pytest.raises(RuntimeError):
            illegal("b")
    assert (log.pieces, log.terminal) == (said("a"), "terminal")


def test_followers_wake_for_pieces_and_terminal_only() -> None:
    log, follower = Log[str](), Counter()
    log.followers.append(follower)
    log.append("a")
    log.append("")
    log.append("b")
    assert follower.woken == 2
    log.end("terminal")
    assert follower.woken == 3


def test_follower_may_leave_while_woken() -> None:
    log, stays = Log[str](), Counter()

    class Leaver:
        def wake(self) -> None:
            log.followers.remove(self)

    log.followers += [Leaver(), stays]
    log.append("a")
    assert stays.woken == 1
    assert log.followers == [stays]
