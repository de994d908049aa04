"""Validators that are no Python packages: from the PATH, or where ./task check-tools puts them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
_PATH = os.pathsep.join(
    # hadolint comes as a Python package, beside the interpreter.
    [str(Path(sys.executable).parent), str(ROOT / ".venv/check-tools"), os.environ.get("PATH", "")]
)


def found(name: str) -> str | None:
    """Path of a validator, None when it is not here."""
    return shutil.which(name, path=_PATH)


def run(
    name: str, *arguments: str | Path, cwd: Path = DEPLOY
) -> "subprocess.CompletedProcess[str]":
    """Run a validator; without it the test is skipped, or fails if CI=true."""
    path = found(name)
    if path is None:
        needs = f"needs {name}; ./task check-tools gets it"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{needs} (CI=true forbids skipping)", pytrace=False)
        pytest.skip(needs)
    return subprocess.run(
        [path, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
