"""One run for one folder: a lock that names its owner and does not outlive it."""

import contextlib
import getpass
import json
import os
import socket
import threading
import time

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
WINDOWS = os.name == "nt"
STALE_SECONDS = 600  # without a sign of life, where the system itself keeps no locks
SIGN_SECONDS = 30


class Locked(Exception):
    """Another run has the folder; the text says whose it is and since when."""


class Lock:
    """Holds a folder from `acquire` to `release`, or to the end of the process.

    The system keeps the lock (flock), so that one whose owner was killed is free. Where the file
    system keeps none, the file says who holds it: a process of this machine that is gone, or one
    of another machine, or any on Windows, that gave no sign of life for ten minutes, holds it no
    more. While it is held a thread gives these signs, however long the work between takes.
    """

    def __init__(self, folder: str, name: str = NAME):
        self.path = os.path.join(folder, name)
        self._file = -1
        self._stop = threading.Event()
        self._signs: threading.Thread | None = None

    def acquire(self, shared: bool = False) -> None:
        """Take the folder.

        Args:
            shared: together with the others that take it so, the processes of one run.

        Raises:
            Locked: another run has it.
        """
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                kept = self._flock(shared)
            except BlockingIOError:
                raise Locked(self._owner()) from None
            # The owner before may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(self._file)):
                    break
            os.close(self._file)
        if not kept and not shared and self._lives():
            minutes = STALE_SECONDS // 60
            raise Locked(f"{self._owner()} (if it has died, for {minutes} minutes after its end)")
        if not shared or not os.fstat(self._file).st_size:
            self._sign()
        self._stop.clear()
        self._signs = threading.Thread(target=self._keep_signing, daemon=True)
        self._signs.start()

    def share(self) -> None:
        """Let the other processes of this run take it, too."""
        self._flock(shared=True)

    def release(self, last: bool = True) -> None:
        """Give the folder back; others of this run may still hold it, unless this is the `last`."""
        if self._signs is not None:
            self._stop.set()
            self._signs.join()
            self._signs = None
        if self._file >= 0:
            if WINDOWS:  # no open file can be removed there
                os.close(self._file)
            if last:
                with contextlib.suppress(OSError):
                    os.remove(self.path)
            if not WINDOWS:
                os.close(self._file)
            self._file = -1

    def _keep_signing(self) -> None:
        while not self._stop.wait(SIGN_SECONDS):
            with contextlib.suppress(OSError):  # the folder may be gone, or its server away
                os.utime(self.path)

    def _flock(self, shared: bool) -> bool:
        """Whether the system keeps the lock; raises BlockingIOError if another process has it."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.lseek(self._file, 0, os.SEEK_SET)
            raise
        except OSError:  # a file system without locks
            return False
        return True

    def _sign(self) -> None:
        owner = {
            "user": _user(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.time(),
        }
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, json.dumps(owner).encode())

    def _read(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            with open(self.path, encoding="utf-8") as file:
                found = json.load(file)
            if isinstance(found, dict):
                return found
        return {}

    def _lives(self) -> bool:
        owner = self._read()
        if not owner:
            return False
        # On Windows os.kill(process, 0) does not ask: it is Ctrl-C.
        if owner.get("host") == socket.gethostname() and not WINDOWS:
            try:
                os.kill(int(owner["process"]), 0)
            except PermissionError:
                return True
            except (OSError, KeyError, ValueError):
                return False
            return True
        # Its own clock may be wrong, and so may the file server's; the limit is generous.
        return time.time() - os.stat(self.path).st_mtime < STALE_SECONDS

    def _owner(self) -> str:
        owner = self._read()
        if not owner:  # it has just begun
            return "another run"
        minutes = max(0.0, time.time() - owner.get("since", 0)) / 60
        age = f"{minutes:.0f} minutes" if minutes < 180 else f"{minutes / 60:.0f} hours"
        return (
            f"process {owner.get('process')} of {owner.get('user')} on {owner.get('host')}, "
            f"which began {age} ago"
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
