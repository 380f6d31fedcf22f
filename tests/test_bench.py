"""The benchmark counts what there is; how fast that was, no test asks."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.bench import load, promises, report, servers
from tests.bench.events import EventLoad, Events
from tests.bench.load import CLOSE, PING, TEXT, Failure, Frames, Load, masked, quantile
from tests.bench.servers import PEERS, SERVERS, TRANSPORTS, Running, Upstream, serve, upstream

BINARY = 2


def frame(payload: bytes, opcode: int = TEXT, *, final: bool = True) -> bytes:
    """Return a server's frame."""
    size = len(payload)
    if size < 126:
        length = bytes((size,))
    elif size < 65536:
        length = b"\x7e" + size.to_bytes(2, "big")
    else:
        length = b"\x7f" + size.to_bytes(8, "big")
    return bytes((128 * final | opcode,)) + length + payload


def cut(data: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """Cut it into pieces of these sizes, over and over."""
    at, turn = 0, 0
    while at < len(data):
        yield data[at : at + sizes[turn % len(sizes)]]
        at += sizes[turn % len(sizes)]
        turn += 1


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (5, 1, 126), (1021,), (65535, 1), (10**6,)])
def test_frames_cut_anywhere_are_parsed_alike(sizes: Sequence[int]) -> None:
    lengths = (0, 1, 125, 126, 127, 300, 65535, 65536, 70000)
    whole = [(TEXT, bytes(97 + i % 26 for i in range(length))) for length in lengths]
    data = b"".join(frame(payload) for _, payload in whole)
    data += frame(b"one ", final=False) + frame(b"?", PING) + frame(b"", 0, final=False)
    data += frame(b"two", 0) + frame(b"\0", BINARY) + frame(b"\x03\xe8", CLOSE)
    whole += [(PING, b"?"), (TEXT, b"one two"), (BINARY, b"\0"), (CLOSE, b"\x03\xe8")]
    frames = Frames()
    assert [found for piece in cut(data, sizes) for found in frames.feed(piece)] == whole


@pytest.mark.parametrize(
    "data",
    [
        masked(TEXT, b"mine"),
        b"\xc1\x01x",  # compressed
        frame(b"no beginning", 0),
        frame(b"one", final=False) + frame(b"another"),
        frame(b"one", final=False) + frame(b"another", final=False),
    ],
    ids=["masked", "compressed", "no beginning", "two messages", "two beginnings"],
)
def test_frame_that_violates_the_protocol_is_a_failure(data: bytes) -> None:
    with pytest.raises(Failure):
        list(Frames().feed(data))


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (5, 1, 26), (10**6,)])
def test_events_cut_anywhere_are_parsed_alike(sizes: Sequence[int]) -> None:
    bodies = (
        [b"id: 1\ndata: one\n\n", b":\n\n", b"data: two\n\ndata: [DO", b"NE]\n\n"],
        [b"data: 3\n\n"],
    )
    data = b"".join(
        HEAD + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*body, b""])
        for body in bodies
    )
    events = Events()
    found = [event for piece in cut(data, sizes) for event in events.feed(piece)]
    assert found == [b"one", b"two", b"[DONE]", b"3"]


def test_response_without_events_is_a_failure() -> None:
    with pytest.raises(Failure, match="429"):
        list(Events().feed(HEAD.replace(b"200 OK", b"429 Too Many Requests")))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 125, 126, 65535, 65536])
def test_masked_frames_can_be_unmasked(size: int) -> None:
    payload = bytes(i % 251 for i in range(size))
    sent = masked(TEXT, payload)
    mask, hidden = sent[-size - 4 :][:4], sent[len(sent) - size :]
    assert bytes(byte ^ mask[i % 4] for i, byte in enumerate(hidden)) == payload
    assert [sent[0], sent[1] & 128] == [128 | TEXT, 128]
    assert list(Frames().feed(frame(payload))) == [(TEXT, payload)]
    assert sent[2 : -size - 4] == frame(payload)[2 : len(frame(payload)) - size]


def test_quantiles_are_measured_values() -> None:
    values = list(range(1, 101))
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert quantile([7.0], 0.99) == 7.0


@pytest.fixture(scope="module")
def model() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Upstream) -> Iterator[Running]:
    with serve(SERVERS["wsserver"], model.url) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "rate"), [(40, 400), (3000, 0)])
def test_clients_count_the_tokens_that_the_model_writes(
    model: Upstream, server: Running, tokens: int, rate: float
) -> None:
    model.plan(tokens=tokens, rate=rate)
    with Load(server.url, stamps=True) as clients:
        clients.latencies = []
        some = clients.connect(5)
        for client in some:
            client.prompt(f"go #{client.number}")
        clients.until(lambda: all(client.over_at for client in some), "all replies")
        assert [client.tokens for client in some] == [tokens] * 5
        assert all(b'"end_turn"' in client.terminal for client in some)
        assert len(clients.latencies) == (tokens * 5 if rate else 0)
        assert all(seconds > 0 for seconds in clients.latencies)
    assert model.stats() == {"open": 0, "requests": 5, "tokens": 5 * tokens, "closes": {}}


@pytest.mark.slow
def test_upstream_reports_stopped_streams(model: Upstream, server: Running) -> None:
    model.plan(rate=20, ahead=500)
    with Load(server.url, stamps=True) as clients:
        some = clients.connect(4)
        for client in some:
            client.prompt(f"go #{client.number}")
        clients.until(lambda: all(client.tokens > 500 for client in some), "paced tokens")
        for client in some[:3]:
            client.stop()
        clients.until(lambda: all(client.over_at for client in some[:3]), "ends of stopped replies")
        stats = model.stats()
        assert set(stats["closes"]) == {str(client.number) for client in some[:3]}
        for client in some[:3]:
            assert stats["closes"][str(client.number)] > client.stopped_at
            assert b'"stopped"' in client.terminal
        some[3].stop()
        clients.until(lambda: bool(some[3].over_at), "the end of the last")
        # Replies of lost clients of other tests may still run.
        assert model.stats()["open"] < stats["open"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, server in TRANSPORTS.items() if server.http])
def test_clients_of_events_count_tokens_and_stop_replies(model: Upstream, name: str) -> None:
    model.plan(rate=50, ahead=40)
    with serve(TRANSPORTS[name], model.url) as running, running.server.clients(running.url) as load:
        assert isinstance(load, EventLoad)
        load.latencies = []
        some = load.connect(3)
        for client in some:
            client.prompt(f"go #{client.number}")
        load.until(lambda: all(client.tokens > 45 for client in some), "paced tokens")
        assert load.bytes > 19 * load.tokens
        assert len(load.latencies) > 15
        some[0].stop()
        load.until(lambda: not some[0].running, "the end of the stopped reply")
        load.until(lambda: bool(model.stats()["closes"]), "the close of the stopped request")
        stats = model.stats()
        assert list(stats["closes"]) == ["1"]
        assert stats["closes"]["1"] > some[0].stopped_at
        assert stats["open"] == 2


@pytest.mark.slow
def test_load_generator_runs_alone(
    model: Upstream, server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    model.plan(tokens=20, rate=0)
    load.main([server.url, "--streams", "3", "--seconds", "0.2", "--prompt", "go"])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["lost"] == "0"
    assert "first" in shown


@pytest.mark.slow
def test_failed_start_of_a_server_shows_its_output(model: Upstream) -> None:
    broken = SERVERS["wsserver"]
    with pytest.raises(Failure, match="WSSERVER_LOG_LEVEL"):
        with serve(
            type(broken)("wsserver", broken.command, env={"WSSERVER_LOG_LEVEL": "loud"}), model.url
        ):
            pass


@pytest.mark.slow
def test_model_writes_next_to_nothing_after_a_stop(
    model: Upstream, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises, "REPLIES", 4)
    assert promises.after_stop(server, model)["tokens"] < 100  # of the 3,000 that are left


@pytest.mark.slow
def test_cut_and_resumed_replies_of_wsserver_are_whole(
    model: Upstream, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises, "REPLIES", 10)
    assert promises.resumed(server, model) == {"lost": 0, "doubled": 0}


class Forgetful(promises.WebSocketTalk):
    """A client that resumes from the wrong piece."""

    async def resume(self) -> None:
        self.seq += self.shift
        await super().resume()

    shift = 0


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "lost", "doubled"), [(2, True, False), (-2, False, True)])
def test_lost_and_doubled_pieces_are_counted(
    model: Upstream,
    server: Running,
    monkeypatch: pytest.MonkeyPatch,
    shift: int,
    lost: bool,
    doubled: bool,
) -> None:
    monkeypatch.setattr(promises, "REPLIES", 5)
    monkeypatch.setattr(promises, "WebSocketTalk", Forgetful)
    monkeypatch.setattr(Forgetful, "shift", shift)
    figures = promises.resumed(server, model)
    assert (figures["lost"] > 0, figures["doubled"] > 0) == (lost, doubled)


def test_short_table_has_medians_and_peers_without_resume() -> None:
    text = report.short_table(results(), ["wsserver", "bun"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["CPU per token (µs)", "30.0", "45.0"] in rows
    assert ["pieces lost over 100 replies, cut and resumed", "–", "no resume"] in rows


def test_transports_table_has_medians_and_goals() -> None:
    found = report.Results()
    found.add("cpu100", "SSE", {"us": 31.0})
    text = report.transports_table(found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["CPU per token (µs)", "–", "31.0", "–", "–", "–", "SSE ≤ 1.15 × WebSocket"] in rows
    assert "≤ 1.15 × WebSocket" in report.table(found, ["wsserver"])


def results() -> report.Results:
    found = report.Results()
    for ours, theirs in ((30, 50), (20, 40), (90, 45)):
        found.add("cpu100", "wsserver", {"us": ours})
        found.add("cpu100", "bun", {"us": theirs})
    found.failed("stop", "bun", "it has ended\nin a bad way")
    return found


def test_lines_of_code_are_without_comments_and_docstrings(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(
        '"""About\n\nit."""\n\n# Why.\nx = 1\n\n\ndef f():\n    """Do."""\n    return x\n'
    )
    assert servers.lines_of_code(file) == 3


def test_table_has_medians_spreads_ratios_and_failures() -> None:
    text = report.table(results(), ["wsserver", "bun"])
    rows = [[cell.strip() for cell in line.split("|")[2:-2]] for line in text.splitlines()]
    assert ["30.0 (20.0–90.0)", "45.0 (40.0–50.0)", "0.67", "–"] in rows
    assert "stop, bun: it has ended" in text


def test_write_keeps_text_outside_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(report.RESULTS.read_text() + "\nby hand\n")
    before, after = outside(path.read_text())
    monkeypatch.setattr(report, "RESULTS", path)
    report.between_marks(path, "a table of nothing", "no such marks")
    for text in ("one table", "another"):
        report.write(text, 3)
        assert outside(path.read_text()) == (before, after)
        assert f"\n{text}\n" in path.read_text()
    assert "one table" not in path.read_text()
    assert after.endswith("\nby hand\n")


def outside(text: str) -> tuple[str, str]:
    before, _, rest = text.partition(report.BEGIN.format("results"))
    return before, rest.partition(report.END.format("results"))[2]


def test_versions_of_peers_are_pinned() -> None:
    manifest = json.loads((PEERS / "package.json").read_text())
    required = (PEERS / "requirements.txt").read_text().splitlines()
    assert all(version.replace(".", "").isdigit() for version in manifest["dependencies"].values())
    assert all("==" in line for line in required)
