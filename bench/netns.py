"""Network namespaces by name, and the commands that run inside them.

A name bears the pid of the bench and a random part, so runs on one machine do not meet. Cold path:
everything is done by ``ip``, whose errors a person can reproduce.
"""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nfqproxy.errors import HostError, NfqproxyError


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace that exists under ``/run/netns``."""

    name: str

    @property
    def path(self) -> Path:
        """The file that setns(2) takes."""
        return Path("/run/netns") / self.name

    def command(self, *words: str) -> list[str]:
        """The command that runs ``words`` inside; ``ip`` becomes them, so its pid is theirs."""
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, *words: str, stdin: str | None = None) -> str:
        """Runs a command inside and returns its output; a failure raises with what it said."""
        return call(self.command(*words), stdin=stdin)

    def ip(self, *words: str) -> str:
        """``ip -n NAME ...``."""
        return call(["ip", "-n", self.name, *words])


def call(command: Sequence[str], *, stdin: str | None = None) -> str:
    """Runs a command to its end; its output, or an error with the command and its last words."""
    try:
        # A session of its own: a second Ctrl-C must not end the command that removes something.
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise HostError(f"{command[0]} is not installed: run ./task setup") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise NfqproxyError(f"`{' '.join(command)}` failed ({done.returncode}): {said}")
    return done.stdout


@contextlib.contextmanager
def namespace(role: str) -> Iterator[Namespace]:
    """A new namespace with its loopback up, removed at the end whatever happens."""
    made = Namespace(f"nfqb-{os.getpid()}-{secrets.token_hex(2)}-{role}")
    try:
        # Inside the try: an interrupt that lands after the command still removes the namespace.
        call(["ip", "netns", "add", made.name])
        made.ip("link", "set", "lo", "up")
        yield made
    finally:
        if made.path.exists():
            call(["ip", "netns", "delete", made.name])
