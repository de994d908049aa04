"""The bench's C programs, compiled on first use.

A binary's name carries a digest of its source and flags, so a changed source is never measured
with a stale binary, and two runs can compile at once.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from nfqproxy.errors import HostError

_SOURCES = Path(__file__).parent / "c"
_BUILD = Path(__file__).parent / "build"
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")


def compiler() -> str:
    """Path of the C compiler; :class:`HostError` names the package when there is none."""
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise HostError("no C compiler (cc) is installed: install the packages gcc and libc6-dev")


def program(name: str) -> Path:
    """The executable of ``bench/c/NAME.c``, compiled if it is not there yet."""
    source = _SOURCES / f"{name}.c"
    cc = compiler()
    digest = hashlib.sha256(source.read_bytes() + " ".join((cc, *_FLAGS)).encode()).hexdigest()
    binary = _BUILD / f"{name}-{digest[:12]}"
    if binary.exists():
        return binary
    _BUILD.mkdir(exist_ok=True)
    unfinished = binary.with_name(f"{binary.name}.{os.getpid()}")
    command = [cc, *_FLAGS, "-o", str(unfinished), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise HostError(
            f"{cc} cannot compile bench/c/{name}.c (are libc6-dev and the kernel's headers "
            f"installed?): {done.stderr.strip()}"
        )
    unfinished.rename(binary)
    return binary
