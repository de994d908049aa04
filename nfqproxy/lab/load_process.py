"""A load generator started in a namespace, seen from the process that started it."""

import subprocess
import sys
import tempfile
from collections.abc import Callable

from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.jobs import Job, Progress, Report, decode_message, encode

__all__ = ["LoadProcess", "run_load"]


class LoadProcess:
    """``python -m nfqproxy.lab.load`` with one job. Read it to its end with :meth:`wait`."""

    def __init__(self, namespace: Namespace, job: Job) -> None:
        self._namespace = namespace
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in wait()
        self._child = namespace.popen(
            sys.executable,
            "-m",
            "nfqproxy.lab.load",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        assert self._child.stdin is not None
        self._child.stdin.write(encode(job))
        self._child.stdin.close()

    def wait(self, on_progress: Callable[[Progress], None] | None = None) -> Report:
        """Read messages until the report; raise NfqproxyError when the process fails."""
        assert self._child.stdout is not None
        report: Report | None = None
        try:
            for line in self._child.stdout:
                message = decode_message(line)
                if isinstance(message, Report):
                    report = message
                elif on_progress is not None:
                    on_progress(message)
            status = self._namespace.stop(self._child, grace_s=5.0)
            if report is None:
                self._stderr.seek(0)
                said = self._stderr.read().decode(errors="replace").strip()
                last = said.splitlines()[-1] if said else "nothing"
                raise NfqproxyError(
                    f"the load generator exited with status {status} and no report: {last}"
                )
        finally:
            self._stderr.close()
        return report


def run_load(
    namespace: Namespace, job: Job, on_progress: Callable[[Progress], None] | None = None
) -> Report:
    """Run one job in a namespace to its end."""
    return LoadProcess(namespace, job).wait(on_progress)
