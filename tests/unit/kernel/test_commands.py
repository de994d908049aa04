"""Where the host's tools are looked for."""

import pytest

from nfqproxy.kernel.commands import complete_path


@pytest.mark.parametrize(
    ("path", "completed"),
    [
        ("/usr/bin:/bin", "/usr/bin:/bin:/usr/sbin:/sbin"),
        ("/usr/local/bin:/usr/bin", "/usr/local/bin:/usr/bin:/usr/local/sbin:/usr/sbin"),
        ("/usr/sbin:/usr/bin", "/usr/sbin:/usr/bin"),
        ("/opt/tools", "/opt/tools"),
        ("/home/user/bin:/bin", "/home/user/bin:/bin:/sbin"),
    ],
)
def test_each_bin_brings_its_sbin(path: str, completed: str) -> None:
    assert complete_path(path) == completed


@pytest.mark.parametrize("path", [None, ""])
def test_no_path_means_the_ordinary_one(path: str | None) -> None:
    assert complete_path(path).split(":")[2:4] == ["/usr/sbin", "/usr/bin"]
