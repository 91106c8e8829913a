"""What the process is told about its memory."""

import platform
import subprocess
import sys

import pytest

from guided_diffusion.devices import reuse_memory

PROGRAM = """
import resource

import torch

from guided_diffusion.devices import reuse_memory

assert reuse_memory()
for i in range(30):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = [torch.zeros(10 << 20, dtype=torch.uint8) for _ in range(4)]
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_used_again_without_new_pages():
    """By itself glibc asks for all of them anew in each round, in most processes."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert int(found.stdout) < 4 * (10 << 20) // 4096, found.stderr


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not reuse_memory()
