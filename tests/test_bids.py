"""--bids: names, descriptions, and what a validator says of them."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from data.bids import parse
from guided_diffusion import __version__
from tests.conftest import task, write_yaml
from tests.volume_files import head, write_nifti, write_series

VALIDATOR = shutil.which("bids-validator-deno") or shutil.which(
    "bids-validator-deno", path=os.path.dirname(sys.executable)
)
SOURCE = "set/sub-01/ses-2/anat/sub-01_ses-2_acq-fast_run-1_T1w.nii.gz"


def denoising(root, **data):
    config = task({"name": "denoise"}, root=root)
    config["data"] |= {"measured": True, "volume_mode": "slices", **data}
    write_yaml("task.yaml", config)


@pytest.fixture
def data_set(tiny_run):
    """A raw data set of one volume of three slices, and the run."""
    os.makedirs(os.path.dirname(SOURCE))
    write_nifti(SOURCE, head().astype(np.float32))
    with open(SOURCE.replace(".nii.gz", ".json"), "w", encoding="utf-8") as file:
        json.dump({"EchoTime": 0.003, "SliceThickness": 4, "MagneticFieldStrength": 3}, file)
    with open("set/dataset_description.json", "w", encoding="utf-8") as file:
        json.dump({"Name": "Heads", "BIDSVersion": "1.10.0", "License": "CC0"}, file)
    denoising(os.path.dirname(SOURCE))
    return tiny_run


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def files_of(folder):
    return sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    )


def validate(folder):
    """(exit status, codes of errors)"""
    done = subprocess.run(
        [VALIDATOR, folder, "--json"], capture_output=True, text=True, timeout=120
    )
    found = json.loads(done.stdout)["issues"]["issues"]
    return done.returncode, {i["code"] for i in found if i["severity"] == "error"}


def test_a_volume_becomes_a_derivative_of_its_data_set(data_set):
    assert data_set("--save_dir", "out", "--num_samples", "2", "--seed", "3", "--bids") == 0
    results = "out/tiny/denoise/gaussian/0.05"
    root, stem = f"{results}/bids", "sub-01/ses-2/anat/sub-01_ses-2_acq-fast_run-1_desc-"
    files = files_of(root)
    for desc in ("restored", "std"):
        assert {f"{stem}{desc}_T1w.nii.gz", f"{stem}{desc}_T1w.json"} <= set(files)
    assert {os.path.splitext(f.replace(".nii.gz", ".json"))[0] for f in files if stem in f} == {
        os.path.splitext(f)[0] for f in files if f.endswith("T1w.json")
    }
    image = nib.load(f"{root}/{stem}restored_T1w.nii.gz")
    [name] = os.listdir(f"{results}/volumes")
    np.testing.assert_array_equal(
        image.get_fdata(), nib.load(f"{results}/volumes/{name}").get_fdata()
    )
    np.testing.assert_array_equal(image.affine, nib.load(SOURCE).affine)
    text = read(f"{root}/{stem}restored_T1w.json")
    assert text["Sources"] == ["bids:raw:" + SOURCE.removeprefix("set/")]
    assert text["EchoTime"] == 0.003 and text["SliceThickness"] == 4  # the same grid
    assert (text["Method"], text["Seed"], text["NumSamples"]) == ("dmps", 3, 2)
    assert (text["Sigma"], text["SoftwareVersion"]) == (0.05, __version__)
    assert text["Settings"]["task_config"]["measurement"]["operator"]["name"] == "denoise"
    whole = read(f"{root}/dataset_description.json")
    assert whole["DatasetType"] == "derivative" and whole["License"] == "CC0"
    assert (
        whole["GeneratedBy"][0] | {"Name": "DMPS-MRI", "Version": __version__}
        == (whole["GeneratedBy"][0])
    )
    link = os.path.normpath(os.path.join(root, whole["DatasetLinks"]["raw"]))
    assert os.path.exists(os.path.join(link, text["Sources"][0].removeprefix("bids:raw:")))
    if VALIDATOR:
        assert validate(root) == (0, set())


def test_thick_slices_made_thin_say_their_resolution(data_set):
    write_nifti(SOURCE, head((32, 34, 6)).astype(np.float32))
    config = task({"name": "thick_slices"}, root=SOURCE)
    config["data"]["measured"] = True
    write_yaml("task.yaml", config)
    assert data_set("--save_dir", "out", "--batch_size", "24", "--bids") == 0
    root = "out/tiny/thick_slices/header/0.05/bids"
    stem = "sub-01/ses-2/anat/sub-01_ses-2_acq-fast_run-1_res-hi_desc-restored_T1w"
    assert nib.load(f"{root}/{stem}.nii.gz").shape == (32, 34, 24)
    text = read(f"{root}/{stem}.json")
    assert text["Resolution"].startswith("1 × 1 × 1 mm") and "SliceThickness" not in text
    assert text["EchoTime"] == 0.003
    if VALIDATOR:
        assert validate(root) == (0, set())


def test_pixels_made_finer_leave_the_slices_as_they_were(data_set):
    config = task({"name": "super_resolution", "scale_factor": 2}, root=SOURCE)
    config["data"]["measured"] = True
    write_yaml("task.yaml", config)
    write_nifti(SOURCE, head((16, 16, 6)))
    assert data_set("--save_dir", "out", "--bids") == 0
    [path] = glob.glob("out/**/*res-hi_desc-restored_T1w.json", recursive=True)
    assert read(path)["Resolution"].startswith("0.5 × 0.5 × 4 mm")
    assert read(path)["SliceThickness"] == 4


@pytest.mark.skipif(not VALIDATOR, reason="bids-validator-deno is not installed")
def test_the_validator_tells_good_from_bad(data_set):
    """Were it to pass everything, the tests above would say nothing."""
    assert data_set("--save_dir", "out", "--bids") == 0
    root = "out/tiny/denoise/gaussian/0.05/bids"
    folder = f"{root}/sub-01/ses-2/anat"
    name = next(n for n in os.listdir(folder) if n.endswith("desc-restored_T1w.nii.gz"))
    os.rename(f"{folder}/{name}", f"{folder}/{name.replace('desc-', 'nonsense-')}")
    status, errors = validate(root)
    assert status != 0 and errors


def test_a_data_set_without_a_description_is_its_files_folder(data_set):
    os.remove("set/dataset_description.json")
    assert data_set("--save_dir", "out", "--bids") == 0
    root = "out/tiny/denoise/gaussian/0.05/bids"
    text = read(next(f"{root}/{f}" for f in files_of(root) if f.endswith("restored_T1w.json")))
    assert text["Sources"] == [f"bids:raw:{os.path.basename(SOURCE)}"]


def test_names_are_taken_apart_and_put_together():
    named = parse("sub-01_acq-x_space-MNI_den-2_desc-old_T1w")
    assert named.folder == os.path.join("sub-01", "anat")
    assert named.derived("restored", False) == "sub-01_acq-x_space-MNI_den-2_desc-restored_T1w"
    assert named.derived("std", True) == "sub-01_acq-x_space-MNI_res-hi_den-2_desc-std_T1w"
    for name in (
        "brain",
        "sub-01",
        "T1w",
        "acq-x_sub-01_T1w",
        "sub-_T1w",
        "sub-0_1_T1w",
        "sub-01_T1w_extra",
        "sub-01_run-1_run-2_T1w",
        "sub-01__T1w",
        "Sub-01_T1w",
    ):
        assert parse(name) is None, name


BAD = {
    "name": ("brain.nii.gz", "brain.nii.gz: expected a BIDS name, sub-LABEL"),
    "suffix": ("sub-01_task-x_bold.nii", "expected an anatomical image (T1w, "),
    "series": ("series", "series: expected a NIfTI volume"),
    "picture": ("images/a1.png", "a1.png: expected a NIfTI volume"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_named_is_refused_before_the_work(tiny_run, capsys, case):
    root, says = BAD[case]
    if case == "series":
        write_series(root, head())
    elif case != "picture":
        write_nifti(root, head())
    denoising(root)
    assert tiny_run("--save_dir", "out", "--bids") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --bids: ") and says in error and "\n" not in error
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    ("operator", "names", "refused"),
    [
        ("denoise", ("sub-01_T1w", "sub-01_desc-preproc_T1w"), True),
        ("denoise", ("sub-01_desc-a_T1w", "sub-01_desc-b_T1w"), True),
        ("denoise", ("sub-01_res-1_T1w", "sub-01_res-2_T1w"), False),
        ("super_resolution", ("sub-01_res-1_T1w", "sub-01_res-2_T1w"), True),
        ("denoise", ("sub-01_desc-a_T1w", "sub-01_desc-a_T2w"), False),
    ],
)
def test_two_results_of_one_name_are_refused_before_the_work(
    tiny_run, capsys, operator, names, refused
):
    os.mkdir("set")
    for name in names:
        write_nifti(f"set/{name}.nii.gz", head((16, 16, 2)).astype(np.float32))
    config = task({"name": operator}, root="set")
    config["measurement"]["operator"] |= {"scale_factor": 2} if operator != "denoise" else {}
    config["data"] |= {"measured": True, "volume_mode": "slices"}
    write_yaml("task.yaml", config)
    status = tiny_run("--save_dir", "out", "--bids")
    error = capsys.readouterr().err.strip()
    assert (status == 2) == refused, error
    if refused:
        assert error.startswith("error: --bids: ") and all(f"{n}.nii.gz" in error for n in names)
        assert not os.path.exists("out")
    else:
        stems = {re.sub("_desc-[a-z]*", "", n).replace("_T", "_desc-restored_T") for n in names}
        restored = {os.path.basename(f) for f in files_of("out") if "desc-restored" in f}
        assert restored == {n + end for n in stems for end in (".nii.gz", ".json")}
