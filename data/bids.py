"""--bids: restored volumes as a BIDS derivative data set (Brain Imaging Data Structure 1.10).

    bids/dataset_description.json    what made it, and of which data set
    bids/sub-01/anat/sub-01_desc-restored_T1w.nii.gz and .json

The entities of the source's name are kept; `desc` tells what a file is, see `KINDS`, and where the
voxels are not the source's, `res-hi` says so. A description says which file it comes from, how, and
with which settings; what the source's own description says comes with it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.nifti import NiftiVolume
from data.nifti_header import read_header
from data.volumes import Slice, Whole
from util.errors import UserError
from util.files import replacing, replacing_text
from util.remote import base_name

FOLDER = "bids"
VERSION = "1.10.0"
KINDS = {  # folder of the results → desc, and in words
    "volumes": ("restored", "the restored image"),
    "std": ("std", "pixelwise standard deviation of the posterior samples"),
    "residual": ("residual", "input minus restored image"),
    "sigma": ("sigma", "standard deviation of the noise that was assumed"),
    "lower": ("lower", "lower bound of the 90 % interval"),
    "upper": ("upper", "upper bound of the 90 % interval"),
}
LABEL = "[0-9a-zA-Z+]+"
NAME = re.compile(rf"(sub-{LABEL}(?:_[a-z0-9]+-{LABEL})*)_([0-9a-zA-Z]+)")
# Entities that BIDS puts after res.
LAST = ("den", "label", "desc")
SUFFIXES = (  # of anatomical images
    *("T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "angio", "T2star"),
    *("FLASH", "PD", "UNIT1", "VFA", "IRT1", "MP2RAGE", "MPM", "MTS", "MTR", "MESE", "MEGRE"),
)
STALE = ("SliceThickness", "SpacingBetweenSlices", "SliceTiming")  # where the slices are others
EXPECTED = "sub-LABEL[_ses-LABEL][_KEY-LABEL…]_SUFFIX.nii.gz, like sub-01_ses-2_T1w.nii.gz"


@dataclass(frozen=True)
class Named:
    """A BIDS name taken apart.

    Attributes:
        entities: (key, label) in their order, sub first. suffix: of an anatomical image.
    """

    entities: tuple[tuple[str, str], ...]
    suffix: str

    def derived(self, desc: str, resampled: bool) -> str:
        """The name of what was made of it, without an ending."""
        replaced = {"desc", "res"} if resampled else {"desc"}
        entities = [(k, v) for k, v in self.entities if k not in replaced]
        if resampled:
            place = next((i for i, (k, _) in enumerate(entities) if k in LAST), len(entities))
            entities.insert(place, ("res", "hi"))
        entities.append(("desc", desc))
        return "_".join([*(f"{k}-{v}" for k, v in entities), self.suffix])

    @property
    def folder(self) -> str:
        """Of its files in a data set: sub-01/ses-2/anat."""
        found = dict(self.entities)
        levels = [f"{k}-{found[k]}" for k in ("sub", "ses") if k in found]
        return os.path.join(*levels, "anat")


def parse(name: str) -> Named | None:
    """A file's name without its ending; None where it is no BIDS name."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    pairs = [part.split("-", 1) for part in match[1].split("_")]
    entities = tuple((key, label) for key, label in pairs)
    if len(dict(entities)) < len(entities):
        return None
    return Named(entities, match[2])


def check_bids(items: Sequence[Any], factor: int = 1) -> None:
    """Find out before the work whether all results can be named.

    Args:
        factor: by which rows and columns of the results are more than the inputs'.

    Raises:
        UserError: an input is no NIfTI volume, has no BIDS name, or is no anatomical image; or the
            results of two would have one name.
    """
    names: dict[str, Any] = {}
    for item in items:
        volume = item.volume if isinstance(item, Slice | Whole) else None
        if not isinstance(volume, NiftiVolume):
            raise UserError(
                f"--bids: {item.label}: expected a NIfTI volume, which BIDS is made of (dcm2niix "
                "converts DICOM)"
            )
        if volume.part is not None:
            raise UserError(
                f"--bids: {volume.label}: expected an anatomical image of one volume, found "
                f"{volume.part.count}; data.volume chooses one"
            )
        stem = re.sub(r"(?i)\.(nii|hdr|img)(\.gz|\.bz2)?$", "", volume.label)
        named = parse(stem)
        if named is None:
            raise UserError(f"--bids: {volume.label}: expected a BIDS name, {EXPECTED}")
        if named.suffix not in SUFFIXES:
            raise UserError(
                f"--bids: {volume.label}: expected an anatomical image ({', '.join(SUFFIXES[:5])}, "
                f"…), found the suffix {named.suffix}"
            )
        name = named.derived(KINDS["volumes"][0], factor > 1 or _is_finer(item))
        other = names.setdefault(name.lower(), volume)  # some file systems ignore case
        if other is not volume:
            raise UserError(
                f"--bids: the results of {other.label} and {volume.label} would both be named "
                f"{name}.nii.gz; expected one of them"
            )


def write_bids(
    items: Sequence[Any],
    folder: str,
    settings: Mapping[str, Any],
    sigmas: Mapping[str, float],
    version: str,
) -> str:
    """Write the data set beside the results it is made of; returns a line that says so.

    Args:
        items: what the run restored, all of it, and `check_bids` has passed.
        folder: of the results; the data set goes into its subfolder bids.
        settings: of the run, for the record.
        sigmas: σ of the [-1, 1] image, by the name of an item, where it is known.
        version: of this program.

    Raises:
        UserError: it cannot be written.
    """
    root = os.path.join(folder, FOLDER)
    try:
        shutil.rmtree(root, ignore_errors=True)
        os.makedirs(root)
        volumes = dict.fromkeys(item.volume for item in items)
        home = _data_set_of(next(iter(volumes)), root)
        count = 0
        for volume in volumes:
            own = next(item for item in items if item.volume is volume)
            for path, kind in _results_of(volume, folder):
                named = parse(volume.name)
                assert named is not None
                resampled = _is_finer(own) or _differs(volume, path)
                to = os.path.join(root, named.folder, named.derived(KINDS[kind][0], resampled))
                os.makedirs(os.path.dirname(to), exist_ok=True)
                with replacing(f"{to}.nii.gz") as temporary:
                    shutil.copyfile(path, temporary)
                text = _described(volume, kind, resampled, path, home, settings, version)
                for key in STALE if _is_finer(own) else ():
                    text.pop(key, None)
                if own.name in sigmas:
                    text["Sigma"] = sigmas[own.name]
                _write_json(f"{to}.json", text)
                count += 1
        _write_json(os.path.join(root, "dataset_description.json"), _data_set(home, version))
        with replacing_text(os.path.join(root, "README")) as file:
            file.write(README.format(version=version))
    except OSError as error:
        raise UserError(f"--bids: {root} cannot be written ({error.strerror or error})") from None
    return f"{os.path.relpath(root, folder)}: {count} images of a BIDS derivative data set"


README = """Images restored with DMPS-MRI {version}, as a BIDS derivative data set.

The JSON file beside each image tells its source, the method, the noise and all settings. The images
are for research, not for diagnosis: a prior learnt from other images has shaped them.
"""


def _results_of(volume, folder) -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        path = os.path.join(folder, kind, f"{volume.name}.nii.gz")
        if os.path.exists(path):
            yield path, kind


def _is_finer(item):
    """Whether the slices of the result are others than the volume's."""
    return isinstance(item, Whole) and item.spacing is not None


def _differs(volume, path):
    header = read_header(path, base_name(path)).header
    return tuple(header.get_data_shape()[:3]) != tuple(volume.shape)


@dataclass(frozen=True)
class _Home:
    """The data set that sources are from: its own folder, a link to it, and its description."""

    folder: str
    link: str
    description: Mapping[str, Any]


def _data_set_of(volume, root):
    """The data set of a source: the nearest folder above it that has a description, or its own."""
    start = os.path.dirname(os.path.abspath(volume.path))
    folder = start
    while True:
        path = os.path.join(folder, "dataset_description.json")
        if os.path.exists(path):
            return _Home(folder, _link(folder, root), _read_json(path))
        above = os.path.dirname(folder)
        if above == folder:
            return _Home(start, _link(start, root), {})
        folder = above


def _link(folder, root):
    return _relative(folder, root) or Path(folder).as_uri()


def _relative(path, start):
    """The path from a folder on, with slashes; None from one drive of Windows to another."""
    try:
        return os.path.relpath(path, start).replace(os.sep, "/")
    except ValueError:
        return None


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _described(volume, kind, resampled, path, home, settings, version):
    """The description of one file."""
    within = _relative(os.path.abspath(volume.path), home.folder)
    if within is None or within.startswith(".."):  # a copy of a file that was fetched
        within = base_name(volume.label)
    stem = re.sub(r"(?i)\.nii(\.gz|\.bz2)?$", "", os.path.abspath(volume.path))
    text = {**_read_json(f"{stem}.json")}
    text |= {"Description": f"{KINDS[kind][1]}, by DMPS-MRI", "Sources": [f"bids:raw:{within}"]}
    text.setdefault("SkullStripped", False)
    if resampled:
        zooms = read_header(path, base_name(path)).header.get_zooms()[:3]
        sides = " × ".join(f"{float(side):.4g}" for side in zooms)
        text["Resolution"] = f"{sides} mm, finer than the source's"
    conditioning = settings["task_config"]["conditioning"]
    text |= {
        "Method": conditioning["method"],
        "Seed": settings["seed"],
        "NumSamples": settings["num_samples"],
        "SoftwareName": "DMPS-MRI",
        "SoftwareVersion": version,
        "Settings": settings,
    }
    return text


def _data_set(home, version):
    """dataset_description.json."""
    name = home.description.get("Name", "images")
    text = {
        "Name": f"{name}, restored",
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {"Name": "DMPS-MRI", "Version": version, "Description": "restoration of MR images"}
        ],
        "SourceDatasets": [{"URL": home.link}],
        "DatasetLinks": {"raw": home.link},
    }
    if "License" in home.description:
        text["License"] = home.description["License"]
    return text


def _write_json(path, text):
    with replacing_text(path) as file:
        json.dump(text, file, indent=2)
        file.write("\n")
