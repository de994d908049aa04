"""CPU time of processes."""

import os
import subprocess
import sys

import pytest

from bench.clocks import process_time
from nfqproxy.errors import NfqproxyError


def test_time_is_that_of_all_processes() -> None:
    one = process_time([os.getpid()])
    assert 0 < one.run_ns < process_time([os.getpid(), os.getpid()]).run_ns


def test_a_process_that_has_ended_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with pytest.raises(NfqproxyError, match=f"process {ended.pid}, which is measured, has ended"):
        process_time([ended.pid])
