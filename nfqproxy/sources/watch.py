"""Following manifest paths by inotify (watchfiles).

Watched are the directories that hold the files, not the files: so an editor's rename-over and a
ConfigMap's swap of its ``..data`` link are seen. What inotify cannot tell (a watched directory
removed and made anew, the far end of a chain of links, a network file system, a change before the
watch stood) shows in a comparison of file status every :data:`RECHECK_S` seconds.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import watchfiles

from nfqproxy.sources import paths as on_disk

logger = logging.getLogger(__name__)

RECHECK_S = 1.0
"""How often file status is compared beside inotify, seconds; as much again per 1,000 files."""
SETTLE_MS = 20
"""A burst of changes ends after this long without one, milliseconds."""
BURST_MS = 400
"""A burst that does not end is told after this long, milliseconds."""


async def watch(
    paths: Sequence[Path], stop: asyncio.Event, *, since: on_disk.Status | None = None
) -> AsyncGenerator[None, None]:
    """One None after each burst of changes to the paths, until ``stop`` is set.

    ``since`` is the status before the last reading (default: now), so that a change between that
    reading and the first wait is told too. The paths need not exist.
    """
    seen = on_disk.status(paths) if since is None else since
    is_told = False
    while not stop.is_set():
        # The consumer may have taken its time: look until there is nothing new, then watch. What
        # changes in the moment between shows at the first time-out.
        while (now := await asyncio.to_thread(on_disk.status, paths)) != seen:
            seen = now
            yield None
        directories = on_disk.directories(paths)
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
            async with contextlib.aclosing(watcher) as bursts:
                async for burst in bursts:
                    if on_disk.directories(paths) != directories:
                        break
                    now = await asyncio.to_thread(on_disk.status, paths)
                    names = {name for name, *_ in now}
                    # A write that leaves time and size as they were is told by inotify alone.
                    if now != seen or any(name in names for _, name in burst):
                        seen = now
                        yield None
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


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
