"""The lock of a key: one builder at a time, over threads, processes and machines.

The kernel of the OS drops the file lock of a dead process. Where it does not (a child of the dead builder inherited the
lock; a file server lost it), a waiter sees by the holder's heartbeat that nobody builds, and goes on without the lock:
two builders of one key are correct, since each builds in private and publishes by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import counters
from .entry import written_whole

BEAT_S = 10.0  # between two heartbeats of a builder
SILENT_S = 60.0  # of a holder's silence, on the waiter's own clock, until it is taken for dead
TIMEOUT_S = 900.0  # longer than any build: past it the waiter builds by itself

_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
log = logging.getLogger("attngen.cache")


@contextmanager
def key_lock(folder: Path, key: str, done: Callable[[], bool]) -> Iterator[None]:
    """Holds folder/<key>.lock, or goes on without it where that is right. A lock file is never unlinked.

    done() says whether what the lock guards is there already. A waiter says whom it waits for and for how long. Raises
    OSError where the lock file cannot be opened.
    """
    from filelock import FileLock, Timeout  # only where something is built: a hit imports nothing

    path = folder / f"{key}.lock"
    broken = _broken(path)  # asked of the OS: releases of filelock differ in what they wait for where there are no locks
    lock = FileLock(path, thread_local=False)
    holder = _Holder(folder / f"{key}.holder")
    start, waits, locked = time.monotonic(), 0, False
    if broken:
        log.warning("no file locks in %s (%s): another process may build the same kernel too", folder, broken)
    while not locked and not broken:
        try:
            lock.acquire(timeout=1 if waits == 0 else min(10.0, SILENT_S / 2))
            locked = True
        except Timeout:
            waits += 1
            waited = time.monotonic() - start
            who = holder.read()
            log.log(logging.INFO if waits == 1 else logging.WARNING, "waiting for %s to build %s (%.0f s so far)", who, key,
                    waited, extra={"facts": {"event": "wait", "key": key, "holder": who, "waited_s": waited}})  # fmt: skip
            if done():
                break
            if holder.dead() or waited > TIMEOUT_S:
                log.warning("%s no longer builds %s, but its lock stays: building it here", who, key)
                break
        except (OSError, NotImplementedError) as error:  # it worked a moment ago
            log.warning("no file locks in %s (%s): another process may build the same kernel too", folder, error)
            break
    if waits:
        counters.count("waits")
        counters.count("wait_ms", 1e3 * (time.monotonic() - start))
    try:
        with holder.beating() if locked else contextlib.nullcontext():
            yield
    finally:
        if locked:
            lock.release()


def _broken(path: Path) -> OSError | None:
    """What the file system says to a lock on ``path``, where it has none. Raises OSError where the file cannot be opened."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _HELD else error
    finally:
        os.close(handle)
    return None


class _Holder:
    """The file that says who holds a lock; its content changes as long as the holder lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[bytes, float] = (b"", time.monotonic())

    def read(self) -> str:
        """Who holds the lock, in words."""
        try:
            content = self.path.read_bytes()
        except OSError:  # it has just finished, or has not yet said
            content = b""
        if content != self._seen[0]:
            self._seen = content, time.monotonic()
        said = self._said()
        return f"process {said['pid']} on {said['host']}" if said else "another process"

    def dead(self) -> bool:
        """Whether the holder, as last read, is a dead process of this machine or has been silent for too long."""
        said = self._said()
        if said and said["machine"] == machine() and not alive(said["pid"]):
            return True
        return time.monotonic() - self._seen[1] > SILENT_S

    def _said(self) -> dict[str, Any]:
        try:
            said = json.loads(self._seen[0])
            return said if isinstance(said["pid"], int) and said["host"] and said["machine"] else {}
        except (ValueError, KeyError, TypeError):
            return {}

    @contextmanager
    def beating(self) -> Iterator[None]:
        stop = threading.Event()
        self._write(0)

        def beat() -> None:
            count = 0
            while not stop.wait(BEAT_S):
                count += 1
                self._write(count)

        thread = threading.Thread(target=beat, daemon=True, name="attngen-lock")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _write(self, count: int) -> None:
        said = {"pid": os.getpid(), "machine": machine(), "host": socket.gethostname(), "beat": count}
        # A full disk ends the build by itself; without a heartbeat a waiter builds too. What has the name is replaced, not followed.
        with contextlib.suppress(OSError), written_whole(self.path, sync=False) as private:
            private.write_text(json.dumps(said) + "\n", encoding="utf-8")


@functools.cache
def machine() -> str:
    """Names the space in which a pid means something: this boot of this host and, in a container, its pid namespace. Hosts that were
    cloned have one name, and the first namespace of each has one number."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host alone
        facts += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def private_name() -> str:
    """A new name of a folder that this process alone uses, which says so (``owner_of``)."""
    return f".build-{machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def owner_of(name: str) -> tuple[str, str]:
    """Machine and pid of the process that made a ``private_name``."""
    owner, pid = name.split("-")[1:3]
    return owner, pid


def alive(pid: int) -> bool:
    """Whether a process of this machine lives (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process has
        return False
    except PermissionError:  # another user's process
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return os.path.isdir(f"/proc/{pid}") or not os.path.isdir("/proc/self")
