"""Following manifest paths by inotify (watchfiles).

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
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TypeAlias

import watchfiles

from nfqproxy.sources import paths as on_disk

logger = logging.getLogger(__name__)

_Burst: TypeAlias = set[tuple[watchfiles.Change, str]]

RECHECK_S = 1.0
"""How often file status is compared beside inotify, seconds; as much again per 1,000 files."""
SETTLE_MS = 5
"""A burst of changes ends after this long without one, milliseconds."""
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
        watcher = watchfiles.awatch(
            *directories,
            watch_filter=None,
            debounce=BURST_MS,
            step=SETTLE_MS,
            stop_event=stop,
            # In proportion for thousands of files: a look costs some 14 us for each.
            rust_timeout=round(RECHECK_S * 1000 * (1 + len(seen) / 1000)),
            yield_on_timeout=True,
            recursive=False,
        )
        try:
            async with contextlib.aclosing(_from_now(watcher)) as bursts:
                async for burst in bursts:
                    if burst and on_disk.directories(paths) != directories:
                        break
                    names = {name for _, name in burst}
                    altered = _altered(names, known) if burst else None
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
        except (OSError, RuntimeError) as error:
            # watchfiles tells the kernel's refusals (EMFILE, ENOSPC: inotify's limits) as
            # RuntimeError. The status of the files can still be compared.
            if not is_told:
                is_told = True
                logger.warning(
                    "no inotify (%s): manifests are looked at every %g s instead; raise "
                    "fs.inotify.max_user_instances and max_user_watches",
                    error,
                    RECHECK_S,
                )
            await _pause(stop, RECHECK_S)
            now = await asyncio.to_thread(on_disk.status, paths)
            if now != seen:
                seen = now
                yield None


async def _from_now(watcher: AsyncGenerator[_Burst, None]) -> AsyncGenerator[_Burst, None]:
    """An empty burst as soon as the watch stands, then its bursts.

    So that what changed before can be looked for without missing what changes meanwhile.
    """
    async with contextlib.aclosing(watcher):
        first = asyncio.ensure_future(anext(watcher, None))
        try:
            # awatch sets its watches up before it first waits, which it does within this one step.
            await asyncio.sleep(0)
            if not first.done():
                yield set()
            burst = await first
        finally:
            if not first.done():
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
        while burst is not None:
            yield burst
            burst = await anext(watcher, None)


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


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
