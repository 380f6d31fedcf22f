"""Runs several processes on one port: each is a node of a cluster.

The supervisor opens the listening sockets and forks the workers, which all accept from them. It
replaces a worker that dies; a worker that dies again soon is replaced after a growing pause. It
passes SIGTERM, SIGINT and SIGHUP on to all workers. It has no event loop and does nothing else, so
that nothing of the workers can make it fail. If the supervisor dies, its workers shut down.
"""

import asyncio
import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from wsserver.errors import ConfigError
from wsserver.logs import log
from wsserver.settings import Settings
from wsserver.sockets import listening, service_manager

STABLE = 10.0  # seconds after which a worker counts as one that works
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a worker is replaced that died soon
BANNER = 65_536  # bytes of what a worker tells when it is ready, at most
USAGE_ERROR = 2  # exit code of a worker whose settings cannot be used

_SIGNALS = (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Parent:
    """The supervisor, as a worker sees it.

    Attributes:
        control: a descriptor that becomes readable when the supervisor has died.
    """

    control: int
    _ready: int

    def tell_ready(self, banner: str) -> None:
        """Tell the supervisor that this worker serves clients."""
        with contextlib.suppress(OSError):
            os.write(self._ready, banner.encode()[:BANNER])
        os.close(self._ready)


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker does: it serves clients on the sockets."""

    settings: Settings
    sockets: Sequence[socket.socket]
    parent: Parent


@dataclass(eq=False, slots=True)
class _Worker:
    """One place for a process, and the process that has it now."""

    number: int
    pid: int | None = None
    ready: bool = False
    began: float = 0.0
    failures: int = 0  # processes in a row that died soon
    due: float | None = 0.0  # when to start a process, by the monotonic clock; None: it runs
    # The supervisor's ends of the two pipes to the process.
    pipes: list[int] = field(default_factory=list)


class Supervisor:
    """Starts the workers and replaces them; see the module.

    Args:
        settings: the settings; `workers` is the number of processes.
        inherited: sockets of the service manager; without them the addresses in the settings.
        announce: called once with the banner of the first worker, when all are ready.
        gone: whether the terminal of this program was closed, at a SIGHUP.
    """

    def __init__(
        self,
        settings: Settings,
        inherited: Sequence[socket.socket],
        announce: Callable[[str], None],
        gone: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._announce = announce
        self._gone = gone
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._sockets = list(inherited)
        self._unix_socket: listening.UnixSocket | None = None
        self._banner = ""  # of the first worker
        self._announced = False
        self._stopping = False
        self._code = 0
        self._selector = selectors.DefaultSelector()
        # Signals wake the selector through these.
        self._signals, self._signalled = socket.socketpair()
        for end in (self._signals, self._signalled):
            end.settimeout(0)

    def run(self) -> Work | int:
        """Supervise until all workers have ended.

        Returns:
            In the supervisor its exit code. In each worker, which is a fork of this process, its
            work.

        Raises:
            ConfigError: the unix socket cannot be used.
            OSError: the address cannot be bound.
        """
        self._bind()
        self._selector.register(self._signals, selectors.EVENT_READ)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        while True:
            for worker in self._waiting():
                if worker.due is not None and worker.due <= time.monotonic():
                    work = self._start(worker)
                    if work is not None:
                        return work
            if self._stopping and all(worker.pid is None for worker in self._workers):
                break
            for key, _ in self._selector.select(self._wait()):
                if key.fileobj is self._signals:
                    self._on_signals()
                else:
                    self._on_ready(key.data)
        if self._unix_socket is not None:
            self._unix_socket.remove()
        return self._code

    def _bind(self) -> None:
        settings = self._settings
        if not self._sockets and settings.unix_socket:
            mode = int(settings.unix_socket_mode, 8)
            self._unix_socket = listening.UnixSocket(settings.unix_socket, mode)
            self._sockets = [self._unix_socket.sock]
        elif not self._sockets:
            self._sockets = asyncio.run(listening.bound(settings.host, settings.port))

    # Starting.

    def _waiting(self) -> list[_Worker]:
        """Return the workers that have to be started, now or later.

        The others wait until the first one has found that the settings can be used.
        """
        workers = self._workers if self._banner else self._workers[:1]
        return [w for w in workers if w.due is not None and not self._stopping]

    def _wait(self) -> float | None:
        """Return the seconds until a worker has to be started; None if none has to."""
        dues = [worker.due for worker in self._waiting() if worker.due is not None]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _start(self, worker: _Worker) -> Work | None:
        """Start a process; return its work in that process."""
        pipes: list[int] = []
        # A signal for the new process waits until that process has handlers of its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pipes += os.pipe()
            pipes += os.pipe()
            pid = os.fork()
        except OSError as error:  # too many processes or descriptors; the other workers go on
            for descriptor in pipes:
                os.close(descriptor)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            pause = self._postpone(worker)
            log.error(
                "worker not started", worker=worker.number, reason=error.strerror, pause=pause
            )
            return None
        told, tell, control, held = pipes
        if not pid:
            for descriptor in (told, held):
                os.close(descriptor)
            return self._as_worker(worker, Parent(control, tell))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for descriptor in (tell, control):
            os.close(descriptor)
        worker.pid, worker.ready, worker.due = pid, False, None
        worker.began, worker.pipes = time.monotonic(), [told, held]
        self._selector.register(told, selectors.EVENT_READ, worker)
        log.info("worker started", worker=worker.number, pid=pid)
        return None

    def _postpone(self, worker: _Worker) -> float:
        """Start a process later, after a pause that grows; return the seconds."""
        worker.failures += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(worker.failures - 1, 10))
        worker.due = time.monotonic() + pause
        return pause

    def _as_worker(self, worker: _Worker, parent: Parent) -> Work:
        """Drop what belongs to the supervisor."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._selector.close()
        self._signals.close()
        self._signalled.close()
        for other in self._workers:
            for descriptor in other.pipes:
                os.close(descriptor)
        os.setpgid(0, 0)  # Ctrl-C of a terminal reaches the supervisor alone
        os.environ.pop("NOTIFY_SOCKET", None)
        changed = {"workers": 1}
        if self._settings.operations_port:
            changed["operations_port"] = self._settings.operations_port + worker.number
        return Work(self._settings.model_copy(update=changed), self._sockets, parent)

    def _on_ready(self, worker: _Worker) -> None:
        told = worker.pipes[0]
        self._selector.unregister(told)
        banner = os.read(told, BANNER).decode(errors="replace")
        if not banner:  # it has ended; SIGCHLD tells how
            return
        worker.ready = True
        self._banner = self._banner or banner
        if all(each.ready for each in self._workers) and not self._announced:
            self._announced = True
            self._announce(f"{self._banner}\n  workers    {len(self._workers)}")
            service_manager.notify("READY=1")

    # Signals.

    def _on_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._signals.recv(4096):
                if number == signal.SIGCHLD:
                    self._reap()
                elif number == signal.SIGHUP and not self._gone():
                    self._reload()
                else:
                    self._stop()

    def _reload(self) -> None:
        service_manager.notify("RELOADING=1")
        self._send(signal.SIGHUP)
        service_manager.notify("READY=1")

    def _stop(self, code: int = 0) -> None:
        """Shut all workers down; the second time at once."""
        if self._stopping:
            self._send(signal.SIGINT)  # another signal: two of a kind may arrive as one
            return
        service_manager.notify("STOPPING=1")
        self._stopping, self._code = True, code
        for sock in self._sockets:
            sock.close()
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for worker in self._workers:
            # A worker that is not ready yet reads everything anew, and SIGHUP would end it.
            if worker.pid is not None and (worker.ready or number != signal.SIGHUP):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    def _reap(self) -> None:
        """Notice which workers have ended, and decide when to replace them."""
        for worker in self._workers:
            if worker.pid is None:
                continue
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            self._ended(worker, os.waitstatus_to_exitcode(status))

    def _ended(self, worker: _Worker, code: int) -> None:
        pid, worker.pid = worker.pid, None
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.pipes[0])
        for descriptor in worker.pipes:
            os.close(descriptor)
        worker.pipes = []
        if self._stopping:
            return
        if code == USAGE_ERROR and not self._banner:  # the worker has written the reason
            self._stop(USAGE_ERROR)
            return
        if time.monotonic() - worker.began >= STABLE:
            worker.failures = 0
        pause = self._postpone(worker)
        log.error("worker died", worker=worker.number, pid=pid, code=code, pause=pause)


def check(settings: Settings) -> None:
    """Check that several processes can serve the same clients.

    Raises:
        ConfigError: they share no conversations.
    """
    if settings.workers > 1 and not settings.cluster:
        raise ConfigError(
            "workers: several processes need a store in PostgreSQL and a Redis; set store and "
            "cluster too"
        )
