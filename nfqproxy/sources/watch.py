"""Following manifest paths by inotify.

Watched are the directories that hold the files, not the files: so an editor's rename-over and a
ConfigMap's swap of its ``..data`` link are seen. What inotify cannot tell (a watched directory
removed and made anew, the far end of a chain of links, a network file system, a change before the
watch stood) shows in a comparison of file status every :data:`RECHECK_S` seconds.
"""

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path

from nfqproxy.sources import paths as on_disk
from nfqproxy.sources.inotify import Inotify

logger = logging.getLogger(__name__)

RECHECK_S = 1.0
"""How often file status is compared beside inotify, seconds; as much again per 1,000 files."""
SETTLE_MS = 1
"""A burst of changes ends after this long without one, milliseconds. (What is slower comes as two: a file
that is cut off then is read again, see the file source.)"""
BURST_MS = 400
"""A burst that does not end is told after this long, milliseconds."""


async def watch(
    paths: Sequence[Path], stop: asyncio.Event, *, since: on_disk.Status | None = None
) -> AsyncGenerator[frozenset[Path] | None, None]:
    """After each burst of changes the manifest files it was about, until ``stop`` is set.

    None: any of the paths' files may have changed, come or gone. ``since`` is the status before the last
    reading (default: now), so that a change between that reading and the first wait is told too. The
    paths need not exist.
    """
    seen = on_disk.status(paths) if since is None else since
    is_told = False
    while not stop.is_set():
        directories = on_disk.directories(paths)
        known = _by_absolute_name(seen)
        # In proportion for thousands of files: a look costs some 14 us for each.
        watcher = _bursts(directories, stop, RECHECK_S * (1 + len(seen) / 1000))
        try:
            async with contextlib.aclosing(watcher) as bursts:
                async for names in bursts:
                    if names and on_disk.directories(paths) != directories:
                        break
                    altered = _altered(names, known) if names else None
                    if altered is None:
                        now = await asyncio.to_thread(on_disk.status, paths)
                        # A write that leaves time and size as they were is told by inotify alone.
                        altered = [
                            name for name in now if now[name] != seen.get(name) or name in names
                        ]
                        is_same_files = now.keys() == seen.keys()
                        seen, known = now, _by_absolute_name(now)
                        if not is_same_files:
                            yield None
                            continue
                    else:
                        seen |= {name: on_disk.file_status(name) for name in altered}
                    if altered:
                        yield frozenset(map(Path, altered))
        except FileNotFoundError:
            # A directory went between listing and watching: list again.
            await asyncio.sleep(0.05)
        except OSError as error:
            # inotify's limits: EMFILE, ENOSPC. The status of the files can still be compared.
            if not is_told:
                is_told = True
                logger.warning(
                    "no inotify (%s): manifests are looked at every %g s instead; raise "
                    "fs.inotify.max_user_instances and max_user_watches",
                    error,
                    RECHECK_S,
                )
            await _happens(stop, RECHECK_S)
            now = await asyncio.to_thread(on_disk.status, paths)
            if now != seen:
                seen = now
                yield None


async def _bursts(
    directories: Iterable[str], stop: asyncio.Event, recheck_s: float
) -> AsyncGenerator[set[str], None]:
    """The paths of each burst of changes; an empty one when nothing has happened for ``recheck_s``.

    The first is empty and comes as soon as the watch stands, so that what changed before can be looked
    for without missing what changes meanwhile.
    """
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    names: set[str] = set()
    with contextlib.closing(Inotify(directories)) as inotify:

        def hear() -> None:
            names.update(inotify.read())
            heard.set()

        stopped = asyncio.ensure_future(stop.wait())
        stopped.add_done_callback(lambda _: heard.set())
        loop.add_reader(inotify.fileno(), hear)
        try:
            yield set()
            while not stop.is_set():
                if await _happens(heard, recheck_s):
                    end_s = loop.time() + BURST_MS / 1000
                    while loop.time() < end_s:
                        heard.clear()
                        if not await _happens(heard, SETTLE_MS / 1000):
                            break
                    heard.clear()
                if stop.is_set():
                    return
                burst = set(names)
                names.clear()
                yield burst
        finally:
            loop.remove_reader(inotify.fileno())
            stopped.cancel()


async def _happens(event: asyncio.Event, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event.wait()
    return event.is_set()


def _by_absolute_name(seen: on_disk.Status) -> dict[str, str]:
    return {os.path.abspath(name): name for name in seen}  # noqa: PTH100 - thousands of strings


def _altered(names: set[str], known: dict[str, str]) -> list[str] | None:
    """The manifests among the names of a burst; None when that may not be all there is to it.

    A temporary file that an editor renamed away, or an ordinary file that is no manifest, means nothing;
    a new manifest, one that went, a link or a directory may mean anything.
    """
    altered: list[str] = []
    for name in names:
        try:
            mode = os.lstat(name).st_mode
        except OSError:
            if name in known:
                return None
            continue
        if not stat.S_ISREG(mode):
            return None
        if name in known:
            altered.append(known[name])
        elif name.endswith(on_disk.SUFFIXES):
            return None
    return altered
