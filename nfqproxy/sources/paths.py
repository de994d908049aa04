"""Manifest paths on disk: which files they stand for, and what tells one state from another.

A path is a file or a directory; of a directory the files ``*.yaml``, ``*.yml`` and ``*.json``
directly inside count, hidden ones (among them a ConfigMap's ``..data``) do not.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from nfqproxy.errors import ManifestError

SUFFIXES = (".yaml", ".yml", ".json")

FileStatus: TypeAlias = tuple[int, int, int, int]
"""Device, inode, time of change in ns, size in bytes; zeros if it is not there."""

Status: TypeAlias = dict[str, FileStatus]
"""By the file's name."""


def files(paths: Sequence[Path]) -> list[Path]:
    """The manifest files, each once, in a settled order; raises ManifestError."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            try:
                inside = _inside(path)
            except OSError as error:
                raise unreadable(path, error) from None
            if not inside:
                raise ManifestError(
                    f"the directory holds no {', '.join('*' + suffix for suffix in SUFFIXES)}; "
                    "put a manifest there",
                    file=str(path),
                )
            for file in inside:
                found.setdefault(os.path.realpath(file), Path(file))
        else:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def read(file: Path, kind: str = "manifest") -> bytes:
    """The bytes of a file of this kind; raises ManifestError."""
    try:
        if file.exists() and not file.is_file():
            raise ManifestError(f"is no regular file; give a {kind} file", file=str(file))
        return file.read_bytes()
    except OSError as error:
        raise unreadable(file, error, kind) from None


def unreadable(path: Path, error: OSError, kind: str = "manifest") -> ManifestError:
    """The error for a path that the system refuses."""
    reason = (error.strerror or str(error)).lower()
    wanted = "manifest file or directory" if kind == "manifest" else f"{kind} file"
    return ManifestError(f"cannot be read: {reason}; give the path of a {wanted}", file=str(path))


def status(paths: Sequence[Path]) -> Status:
    """A value that differs when a file was replaced, written, made or removed."""
    return {name: file_status(name) for name in _candidates(paths)}


def file_status(name: str) -> FileStatus:
    """The part of one file."""
    try:
        at = os.stat(name)  # noqa: PTH116 - strings: this runs for thousands of files
    except OSError:
        return 0, 0, 0, 0
    # The time of status change, not of modification: a copy may preserve the latter.
    return at.st_dev, at.st_ino, at.st_ctime_ns, at.st_size


def directories(paths: Sequence[Path]) -> dict[str, tuple[int, int]]:
    """The directories in which a change of the paths shows, with device and inode of each.

    A file shows in its directory and in that of the file a link leads to; a directory in itself and
    in its parent, should it be removed and made anew. In place of what is not there stands the
    nearest directory above it.
    """
    wanted: set[Path] = set()
    for path in paths:
        for place in (path.absolute(), path.resolve()):
            wanted.add(place.parent)
            if place.is_dir():
                wanted.add(place)
    found: dict[str, tuple[int, int]] = {}
    for place in wanted:
        while True:
            try:
                at = place.stat()
            except OSError:
                if place == place.parent:
                    break
                place = place.parent
                continue
            found[str(place)] = (at.st_dev, at.st_ino)
            break
    return found


def _candidates(paths: Sequence[Path]) -> list[str]:
    """The names of the files as far as they can be seen now; never raises."""
    found: list[str] = []
    for path in paths:
        try:
            found.extend(_inside(path))
        except OSError:
            found.append(str(path))
    return found


def _inside(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(
            entry.path
            for entry in entries
            if not entry.name.startswith(".")
            and entry.name.endswith(SUFFIXES)
            and not entry.is_dir()
        )
