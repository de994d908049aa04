"""What the unit tests of several packages need."""

import sys
from collections.abc import Callable

import pytest

from nfqproxy.cli import main as command_line

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """``cli("rules", "render")``: exit status, stdout and stderr of the command in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nfqproxy", *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line.main()
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, said.out, said.err

    return run
