"""Manifests on disk for the tests of the file source."""

from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    """Write a file below tmp_path and return its path."""

    def to(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return to
