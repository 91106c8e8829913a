"""Training by several processes: what ends one of them ends all, in one sentence."""

import subprocess
import sys

from tests.conftest import REPOSITORY


def test_two_processes_end_together():
    """In a process of its own: it forks, which what other tests started would not survive."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, "tests/training_by_two.py"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
