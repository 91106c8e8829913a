"""--output: which of the results goes there."""

import os

import numpy as np
import pytest

from data.dataloader import list_items
from data.output import write_output
from tests.volume_files import write_nifti


@pytest.mark.parametrize("last_first", [False, True])  # folders are listed in any order
def test_the_result_of_a_longer_name_is_another_s(tmp_path, monkeypatch, last_first):
    monkeypatch.chdir(tmp_path)
    os.mkdir("volumes")
    for name in ("a", "a.z"):
        write_nifti(f"{name}.nii.gz", np.ones((8, 8, 2), np.float32))
        with open(f"volumes/{name}.nii.gz", "w", encoding="utf-8") as file:
            file.write(f"of {name}")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listed(path), reverse=last_first))
    items = list_items({"root": "a.nii.gz", "measured": True})
    write_output("r.nii.gz", items, ".")
    with open("r.nii.gz", encoding="utf-8") as file:
        assert file.read() == "of a"
