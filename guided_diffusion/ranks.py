"""The images of a run shared out among processes, any of which may die.

There are no collectives here: a counter and some notes in a `torch.distributed.TCPStore` are all
that the processes share, so nobody waits for a dead one. And as launchers end every process when
one of them dies, each that torchrun or mpiexec started stays behind as a watcher, which does
nothing that could kill it, while its child works.
"""

import ctypes
import datetime
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from guided_diffusion.launch import (
    TORCHRUN_VARIABLES,
    launched,
    note_if_alone,
    processes_started,
    share_threads,
)
from util.errors import UserError
from util.terminal import Bar, say

POLL_SECONDS = 0.2
PARTING_SECONDS = 10
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h
PART = 1_000_000  # of an image, in which the store counts what is in work
MEETING = datetime.timedelta(minutes=30)  # a rank may have a large checkpoint to fetch first


class Ranks:
    """This process's place among those of a run; a single one has no store and meets nobody."""

    def __init__(
        self,
        rank: int | None = None,
        size: int = 1,
        store: "dist.Store | None" = None,
        voice: str = "",
    ):
        self.rank, self.size, self.store = rank, size, store
        self.voice, self.lines = voice, 0
        self.bar: Bar | None = None
        self.done = self.found = 0
        self.work = self._noted = 0.0
        self._next_note = 0.0

    def __bool__(self) -> bool:
        """Whether there is more than one."""
        return self.size > 1

    def open(self, total: int) -> None:
        """The first process says that the results are open for `total` images, others wait.

        Raises:
            SystemExit: the first has failed, and said why.
        """
        if self.store is None:
            self.bar = Bar(total)
        elif self.rank == 0:
            self.store.set("total", str(total))
            self.store.set("opened", "yes")
        elif self.store.get("opened") != b"yes":
            sys.exit(2)

    def share(self, count: int) -> Iterator[int]:
        """Yield of 0 … count - 1 those that fall to this process: the next whenever it is free."""
        if self.store is None:
            yield from range(count)
            return
        while (i := self.store.add("taken", 1) - 1) < count:
            yield i

    def advance(self, work: float, now: str = "", done: int = 0, found: int = 0) -> None:
        """Note progress for the bar.

        Args:
            work: images' worth of work done since the last call.
            now: what is in work.
            done: images that are dealt with since then.
            found: how many of them an earlier run had restored.
        """
        self.work, self.done, self.found = self.work + work, self.done + done, self.found + found
        if self.bar is not None:
            self.bar.show(self.done, self.work, self.found, now)
        elif self.store is not None and (done or time.monotonic() > self._next_note):
            self._next_note = time.monotonic() + POLL_SECONDS
            parts = round(PART * (self.work - self._noted))
            self._noted += parts / PART
            for key, amount in (("work", parts), ("found", found), ("done", done)):
                self.store.add(key, amount)
            self.store.set("now", now)

    def say(self, text: str, error: bool = False) -> None:
        """Print a line, through the process that draws the progress bar; an error is said once."""
        if self.store is not None:
            try:
                digest = hashlib.sha256(text.encode()).hexdigest()
                if not error or self.store.add(f"error/{digest}", 1) == 1:
                    self.store.set(f"line/{self.voice}/{self.lines}", json.dumps([text, error]))
                    self.lines += 1
                return
            except dist.DistError:
                pass  # the process that prints has gone
        say(text, error)

    def close(self) -> None:
        """Put the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def leave(self, **record: Any) -> list[dict[str, Any]] | None:
        """End this process's share: wait for the others, and find out who closes the run.

        Args:
            record: what it has to say of its share, as JSON takes it.

        Returns:
            The records of all processes if this is the one to close the run, else None. A dead
            process has no record.
        """
        if self.store is None:
            return [record]
        self.store.set(f"left/{self.rank}", json.dumps(record))
        keys = [f"left/{rank}" for rank in range(self.size)]
        while not self.store.check(keys):
            time.sleep(POLL_SECONDS)
        records = [json.loads(self.store.get(key)) for key in keys]
        first = min(rank for rank, found in enumerate(records) if found is not None)
        return [r for r in records if r is not None] if first == self.rank else None


def share_out(work: Callable[[Ranks], int]) -> int:
    """Call ``work(ranks)`` in every process that torchrun or mpiexec started.

    Returns:
        The exit status: work's, or of a watcher, its child's.

    Raises:
        UserError: see `launched`; or this system has no safe fork.
    """
    size = processes_started()
    if size == 1:
        note_if_alone()
        return work(Ranks())
    if sys.platform != "linux":
        raise UserError(f"{size} processes can share the images on Linux only, start one here")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # and it has no part in MPI, which does not survive forking
        os.close(writer)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # no life without the watcher
        with open(reader, encoding="utf-8") as pipe:
            variables = pipe.read()
        if not variables:  # the processes have not met, as the watcher says
            sys.exit(2)
        os.environ.update(json.loads(variables))
        share_threads()
        rank, size = launched()
        return work(Ranks(rank, size, _meet(host=False), f"rank{rank}"))
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        rank, size = launched()
        json.dump({k: v for k, v in os.environ.items() if k in TORCHRUN_VARIABLES}, pipe)
    return _Watcher(rank, size, child).watch()


def _torchrun_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(host: bool) -> "dist.Store":
    """The store at torchrun's address; `host`: this process keeps it, if torchrun does not."""
    host = host and not _torchrun_keeps_store()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=host, timeout=MEETING, wait_for_workers=False)
    # A run that torchrun has started again must not find the notes of the one before.
    return dist.PrefixStore(f"images/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class _Watcher:
    """Waits for a child's end, notes it if the child did not, and, the first, shows progress."""

    def __init__(self, rank: int, size: int, child: int):
        self.rank, self.size, self.child = rank, size, child
        self.status: int | None = None
        self.bar: Bar | None = None
        self.stopped: float | None = None
        self.keeps_store = rank == 0 and not _torchrun_keeps_store()
        self.next_line = {f"{who}{r}": 0 for who in ("rank", "watcher") for r in range(size)}
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._pass_on)
        self.store = _meet(host=rank == 0)
        self.ranks = Ranks(rank, size, self.store, f"watcher{rank}")

    def _pass_on(self, signum, frame):
        self.stopped = self.stopped or time.monotonic()
        if self.status is None:
            os.kill(self.child, signal.SIGTERM)

    def watch(self) -> int:
        """Returns the exit status, when all processes have come to their end."""
        try:
            while not self._all_ended():
                time.sleep(POLL_SECONDS)
                self._show()
            self._show()
            self._part()
        except dist.DistError:  # the launcher has ended the process that keeps the store
            if self.status is None:
                self._wait(0)
        if self.bar is not None:
            self.bar.close()
        assert self.status is not None  # all ended
        return self.status

    def _part(self):
        """The first, which may keep the store, goes last."""
        if self.rank != 0:
            self.store.add("parted", 1)
            return
        deadline = time.monotonic() + PARTING_SECONDS
        while self.store.add("parted", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _wait(self, options):
        pid, found = os.waitpid(self.child, options)
        if pid:
            self.status = os.waitstatus_to_exitcode(found)
        return pid

    def _all_ended(self):
        if self.status is None and self._wait(os.WNOHANG):
            assert self.status is not None  # as `_wait` found it
            if not self.store.check([f"left/{self.rank}"]):
                self.store.set(f"left/{self.rank}", "null")
            if self.rank == 0 and not self.store.check(["opened"]):
                self.store.set("opened", "no")
            if self.status < 0:
                name = signal.Signals(-self.status).name
                self.ranks.say(f"error: rank {self.rank} of {self.size} was ended by {name}", True)
                self.status = 1
            self.store.add("ended", 1)
        return self.status is not None and (
            self.store.add("ended", 0) == self.size or self._waited_enough()
        )

    def _waited_enough(self):
        """Whether this process was told to stop and another, though it was too, does not."""
        if self.stopped is None or self.keeps_store:
            return False
        return time.monotonic() > self.stopped + PARTING_SECONDS

    def _show(self):
        """Print what the processes have said, and how many images they have dealt with."""
        if self.rank != 0:
            return
        if self.bar is None and self.store.check(["total"]):
            self.bar = Bar(int(self.store.get("total")))
        for voice in self.next_line:
            while self.store.check([key := f"line/{voice}/{self.next_line[voice]}"]):
                text, error = json.loads(self.store.get(key))
                self.store.delete_key(key)
                self.next_line[voice] += 1
                say(text, error)
        if self.bar is not None and self.store.check(["now"]):
            done, work, found = (self.store.add(key, 0) for key in ("done", "work", "found"))
            self.bar.show(done, work / PART, found, self.store.get("now").decode())
