"""The file source against a real file system and inotify.

No test looks at the clock: each waits for the next state, and a state that never comes is caught
by the bound on the whole (TIMEOUT_S).
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nfqproxy.errors import ManifestError
from nfqproxy.sources import watch
from nfqproxy.sources.file import FileSource
from nfqproxy.sources.inotify import Inotify

TIMEOUT_S = 30


def service(name):
    return (
        f"{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, "
        "spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}}\n"
    )


@pytest.fixture
def inotify_alone(monkeypatch):
    """The comparison of file status does not help: what comes was told by inotify."""
    monkeypatch.setattr(watch, "RECHECK_S", 3600.0)


def watched_inodes():
    """The inodes on which this process holds an inotify watch (proc_pid_fdinfo(5))."""
    found = set()
    for entry in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found |= {
                int(inode, 16)
                for inode in re.findall(r"^inotify .*ino:(\w+)", entry.read_text(), re.M)
            }
    return found


async def standing(path):
    """Wait until the watch on this directory stands."""
    while path.stat().st_ino not in watched_inodes():  # noqa: ASYNC110 - the kernel's state
        await asyncio.sleep(0.005)


def follow(paths, *steps, directory):
    """Load, then per step: do it, and see the names of the Services that come of it.

    A step is (action, expected names or None for nothing to wait for); each is done while
    ``changes`` waits, its watch on ``directory`` standing.
    """

    async def run():
        source = FileSource(paths)
        source.load()
        stop = asyncio.Event()
        async with asyncio.timeout(TIMEOUT_S):
            async with contextlib.aclosing(source.changes(stop)) as changes:
                for action, expected in steps:
                    if expected is None:
                        await action(source)
                        continue
                    coming = asyncio.create_task(anext(changes))
                    await standing(directory)
                    await action(source)
                    assert await coming
                    assert [item.name for item in source.objects.services] == expected
                    assert source.last_error is None
                coming = asyncio.create_task(anext(changes, None))
                await standing(directory)
                stop.set()
                assert await coming is None

    asyncio.run(run())


def step(function, *arguments):
    """An action from an ordinary function."""

    async def action(source):
        function(*arguments)

    return action


def write_whole(path, text):
    """As editors save: write beside, rename over."""
    beside = path.with_name(f".{path.name}.swp")
    beside.write_text(text)
    beside.rename(path)


def test_a_file_written_in_place_and_renamed_over(tmp_path, inotify_alone):
    path = tmp_path / "m.yaml"
    path.write_text(service("a"))
    follow(
        [path],
        (step(path.write_text, service("b")), ["b"]),
        (step(write_whole, path, service("c")), ["c"]),
        (step(write_whole, path, service("d")), ["d"]),
        (step(path.write_text, service("e")), ["e"]),
        directory=tmp_path,
    )


def test_a_file_that_is_removed_and_comes_back(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(service("a"))

    async def remove_and_restore(source):
        path.unlink()
        assert not await source.reload()
        assert "no such file or directory" in source.last_error
        path.write_text(service("b"))

    follow(
        [path],
        (remove_and_restore, ["b"]),
        (step(path.write_text, service("c")), ["c"]),
        directory=tmp_path,
    )


def test_files_come_and_go_in_a_directory(tmp_path, inotify_alone):
    (tmp_path / "a.yaml").write_text(service("a"))
    follow(
        [tmp_path],
        (step((tmp_path / "b.yaml").write_text, service("b")), ["a", "b"]),
        (step((tmp_path / "a.yaml").unlink), ["b"]),
        (step((tmp_path / "c.yml").write_text, service("c")), ["b", "c"]),
        (step((tmp_path / "b.yaml").rename, tmp_path / "notes.txt"), ["c"]),
        directory=tmp_path,
    )


def test_a_directory_that_is_removed_and_made_anew(tmp_path):
    directory = tmp_path / "above" / "manifests"
    directory.mkdir(parents=True)
    path = directory / "a.yaml"
    path.write_text(service("a"))

    async def remove_and_restore(source):
        shutil.rmtree(tmp_path / "above")
        assert not await source.reload()
        assert source.last_error is not None
        directory.mkdir(parents=True)
        path.write_text(service("b"))

    # The second change shows that the new directory is watched, not the old one's ghost.
    follow(
        [directory],
        (remove_and_restore, ["b"]),
        (step(path.write_text, service("c")), ["c"]),
        directory=directory,
    )


@pytest.mark.parametrize("give_file", [True, False])
def test_a_config_map_swaps_its_link(tmp_path, give_file, inotify_alone):
    """The layout of a ConfigMap volume: m.yaml -> ..data/m.yaml, ..data -> ..2026_01."""

    def publish(stamp, text):
        (tmp_path / stamp).mkdir()
        (tmp_path / stamp / "m.yaml").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(stamp)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        for old in tmp_path.glob("..2026_*"):
            if old.name != stamp:
                shutil.rmtree(old)

    publish("..2026_01", service("a"))
    path = tmp_path / "m.yaml"
    path.symlink_to("..data/m.yaml")
    follow(
        [path if give_file else tmp_path],
        (step(publish, "..2026_02", service("b")), ["b"]),
        (step(publish, "..2026_03", service("c")), ["c"]),
        directory=tmp_path,
    )


def test_a_link_to_a_file_elsewhere(tmp_path, inotify_alone):
    target = tmp_path / "far" / "target.yaml"
    target.parent.mkdir()
    target.write_text(service("a"))
    path = tmp_path / "near" / "m.yaml"
    path.parent.mkdir()
    path.symlink_to(target)
    follow(
        [path],
        (step(target.write_text, service("b")), ["b"]),
        (step(write_whole, target, service("c")), ["c"]),
        directory=target.parent,
    )


def test_a_change_between_loading_and_watching_is_not_lost(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(service("a"))

    async def run():
        source = FileSource([path])
        source.load()
        path.write_text(service("b"))
        async with asyncio.timeout(TIMEOUT_S):
            async with contextlib.aclosing(source.changes(asyncio.Event())) as changes:
                change = await anext(changes)
        assert [item.name for item in change.upserts] == ["b"]

    asyncio.run(run())


def test_single_files_are_named(tmp_path, inotify_alone, monkeypatch):
    """Of what other files say nothing is read again, neither at first nor while following."""
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(service(name))
    asked = []

    async def reload(self, files=None):
        asked.append(files)
        return await whole(self, files)

    whole = FileSource.reload
    monkeypatch.setattr(FileSource, "reload", reload)
    middle = tmp_path / "b.yaml"
    follow(
        [tmp_path],
        (step(write_whole, middle, service("d")), ["a", "c", "d"]),
        (step(middle.write_text, service("e")), ["a", "c", "e"]),
        (step((tmp_path / "notes.txt").write_text, "nothing"), None),
        (step(middle.write_text, service("f")), ["a", "c", "f"]),
        directory=tmp_path,
    )
    assert asked
    assert set(asked) == {frozenset({middle})}


def test_a_bad_file_is_told_once_and_the_last_good_state_stays(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "m.yaml"
    path.write_text(service("a"))
    bad = service("a").replace("port: 80", "port: 70000")

    async def run():
        source = FileSource([path])
        good = source.load()
        path.write_text(bad)
        assert not await source.reload()
        assert not await source.reload()
        os.utime(path)
        assert not await source.reload()
        assert source.objects == good
        assert source.last_error == (
            f"{path}: Service default/a: spec.ports[0].port: 70000 is out of range; give 1 to 65535"
        )
        path.write_text(service("a"))
        assert not await source.reload()  # the same objects as before
        assert source.last_error is None
        path.write_text(service("b"))
        assert await source.reload()

    asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert caplog.records[0].getMessage().endswith("; the last good state stays in force")
    assert caplog.records[1].getMessage() == f"{path}: good again"


def test_a_mended_file_is_seen_while_following(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(service("a"))

    async def break_then_mend(source):
        path.write_text("kind: [")

        async def mend():
            async with asyncio.timeout(TIMEOUT_S):
                while source.last_error is None:  # noqa: ASYNC110 - what a user sees
                    await asyncio.sleep(0.01)
            path.write_text(service("b"))

        source.mending = asyncio.create_task(mend())

    follow([path], (break_then_mend, ["b"]), directory=tmp_path)


def test_a_touch_without_change_gives_nothing(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(service("a"))

    async def touch_then_write(source):
        os.utime(path)
        assert not await source.reload()
        path.write_text(service("b"))

    follow([path], (touch_then_write, ["b"]), directory=tmp_path)


def test_the_first_load_raises_what_is_wrong(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("kind: [")
    with pytest.raises(ManifestError, match="not YAML"):
        FileSource([path]).load()


WITHOUT_INOTIFY = """
import asyncio, ctypes, os, resource, sys
from pathlib import Path
from nfqproxy.sources.file import FileSource
from nfqproxy.sources.inotify import Inotify

# Inotify instances are counted by effective user: another one's are used up here, while files are
# still opened as root (setfsuid(2)).
libc = ctypes.CDLL(None)
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
os.setresuid(0, 61184 + os.getpid() % 4096, 0)
libc.setfsuid(0)
while libc.inotify_init() != -1:
    pass

async def run(path, text):
    source = FileSource([path])
    source.load()
    stop = asyncio.Event()
    async with asyncio.timeout(30):
        coming = asyncio.create_task(anext(source.changes(stop)))
        await asyncio.sleep(0.1)
        path.write_text(text)
        print(*(item.name for item in (await coming).upserts))

asyncio.run(run(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.kernel
def test_where_inotify_is_used_up_the_files_are_looked_at(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(service("a"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_INOTIFY, str(path), service("b")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "b\n"), done.stderr
    assert done.stderr.count("no inotify (") == 1
    assert "manifests are looked at every 1 s instead" in done.stderr


def test_when_the_kernel_loses_events_all_is_looked_at(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.touch()
    other.touch()
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with contextlib.closing(Inotify([str(tmp_path)])) as inotify:
        os.utime(one)
        assert inotify.read() == {str(one)}
        # In turn, for equal events in a row are told once.
        for _ in range(most // 2 + 1):
            os.utime(one)
            os.utime(other)
        assert inotify.read() == {str(one), str(other), str(tmp_path)}


def test_a_directory_by_two_names_is_told_by_both(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = [str(tmp_path / "real"), str(tmp_path / "link")]
    with contextlib.closing(Inotify(names)) as inotify:
        (tmp_path / "real" / "one.yaml").write_text("a: 1")
        assert inotify.read() == {f"{name}/one.yaml" for name in names}


def test_a_directory_that_is_not_there_cannot_be_watched(tmp_path):
    before = watched_inodes()
    with pytest.raises(FileNotFoundError, match="absent"):
        Inotify([str(tmp_path), str(tmp_path / "absent")])
    assert watched_inodes() == before
