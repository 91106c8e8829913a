"""Volumes restored as a whole: thick slices made thin, planes in turn, and one path with slices."""

import csv
import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from data.volumes import Whole, write_volumes
from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig, read_schedule
from guided_diffusion.methods import METHODS
from guided_diffusion.operators import OPERATORS, get_operator
from guided_diffusion.operators.thick_slices import restored_count, slice_count
from guided_diffusion.restoration import restore
from guided_diffusion.sampling import Kept
from guided_diffusion.volumes import AsVolume
from tests.conftest import task, write_yaml
from tests.volume_files import items_of, series_values, write_nifti, write_series
from util.errors import UserError
from util.random import Place

OBLIQUE = np.array([[0, 0.6, 2.4, 9], [-0.8, 0.1, 0.2, 5], [0.1, 0.9, -1, -7], [0, 0, 0, 1.0]])


def thick(thickness=5.0, spacing=5.0, fine=1.0, profile="box", shape=(40, 2, 3), threshold=0):
    lengths = {"thickness": thickness, "spacing": spacing, "target_spacing": fine}
    rest = {"profile": profile, "singular_value_threshold": threshold}
    return get_operator("thick_slices", shape, dtype=torch.float64, **lengths, **rest)


def test_a_box_of_whole_voxels_is_a_block_mean():
    x = torch.randn(1, 40, 2, 3, dtype=torch.float64)
    blocks = x.reshape(1, 8, 5, 2, 3).mean(dim=2)
    torch.testing.assert_close(thick().forward(x), blocks)


@pytest.mark.parametrize("profile", ["box", "gaussian"])
@pytest.mark.parametrize(
    ("thickness", "spacing", "fine"),
    [(5, 5, 1), (4, 5, 1), (5, 3.5, 0.7), (3.3, 4.1, 0.9), (2, 2, 2)],
)
def test_a_slice_sees_its_own_place(profile, thickness, spacing, fine):
    """A linear function along the axis has, in each slice, its value at the slice's centre."""
    operator = thick(thickness, spacing, fine, profile, (60, 1, 1))
    z = (torch.arange(60, dtype=torch.float64) - 59 / 2) * fine
    y = operator.forward(z.reshape(1, 60, 1, 1)).flatten()
    centres = (torch.arange(len(y), dtype=torch.float64) - (len(y) - 1) / 2) * spacing
    inside = slice(1, -1) if profile == "gaussian" else slice(None)  # tails leave the volume
    torch.testing.assert_close(y[inside], centres[inside], atol=0.05 * fine, rtol=0)
    assert float((y - centres).abs().max()) < 0.4 * thickness
    constant = operator.forward(torch.ones(1, 60, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(constant, torch.ones_like(constant))


def test_the_gaussian_s_width_at_half_maximum_is_the_thickness():
    operator = thick(6.0, 6.0, 0.05, "gaussian", (600, 1, 1))
    point = operator.transpose(torch.eye(5, dtype=torch.float64)[2].reshape(1, 5, 1, 1)).flatten()
    width = 0.05 * float((point > point.max() / 2).sum())
    assert width == pytest.approx(6.0, abs=0.11)


def test_depths_and_counts_belong_to_one_another():
    for thickness, spacing, fine in ((5, 5, 1), (4, 5, 1), (6, 5, 0.9), (3.3, 4.1, 0.7)):
        for count in range(1, 60):
            depth = restored_count(count, thickness, spacing, fine)
            assert slice_count(depth, thickness, spacing, fine) == count
            covered = (count - 1) * spacing + thickness
            assert covered - 1e-6 <= depth * fine < covered + fine


def test_lengths_that_make_no_sense_are_refused():
    for lengths in ({"fine": 6.0}, {"thickness": 41.0}):
        with pytest.raises(UserError, match="measurement.operator"):
            thick(**lengths)
    with pytest.raises(UserError, match="thickness: expected a number of mm"):
        get_operator("thick_slices", (40, 2, 3))


class Planes:
    """A network that keeps what it sees, and predicts it."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, timesteps):
        self.seen.append(x)
        return torch.cat([x, x + 100], dim=1)


def test_the_network_sees_every_plane_upright_and_in_turn():
    """Voxels that hold their world coordinates; rows run away from superior, then anterior."""
    z, y, x = torch.meshgrid(
        torch.arange(5.0), -torch.arange(6.0), -torch.arange(7.0), indexing="ij"
    )  # upward slices, shown as radiologists do
    network = Planes()
    sliced = AsVolume(chunk=100, in_turn=True).network(network, steps=3)
    for world, (rows, cols) in zip((z, y, x), ((y, x), (z, x), (z, y)), strict=True):
        volume = torch.stack([z, y, x])
        output = sliced(volume, torch.zeros(3, dtype=torch.int64))
        assert torch.equal(output, torch.cat([volume, volume + 100], dim=1))  # back in its place
        images = dict(zip("zyx", network.seen.pop().chunk(3), strict=True))
        name = {id(z): "z", id(y): "y", id(x): "x"}
        assert (images[name[id(world)]].flatten(1).std(dim=1) == 0).all()
        down, right = images[name[id(rows)]], images[name[id(cols)]]
        assert (down.diff(dim=2) == -1).all() and (down.diff(dim=3) == 0).all()
        assert (right.diff(dim=3) == -1).all() and (right.diff(dim=2) == 0).all()


@pytest.fixture
def tiny(tiny_run):
    from guided_diffusion.prior import load_prior

    return load_prior("model.yaml", "cpu", "fp32")


SLICEWISE = {  # operators that act on each slice by itself
    "sr": OperatorConfig("super_resolution", {"scale_factor": 4}),
    "denoise": OperatorConfig("denoise"),
    "aniso": OperatorConfig("deblur", {"type": "aniso", "intensity": [2.0, 1.0]}),
    "uniform": OperatorConfig("deblur", {"type": "uniform"}),
    "mri": OperatorConfig("mri", {"acceleration": 2}),
}
ALONE = [(method, "sr", "gaussian") for method in METHODS]
ALONE += [("spectral", operator, "gaussian") for operator in SLICEWISE if operator != "sr"]
ALONE += [("ddrm", "denoise", "rician"), ("ddnm", "denoise", "clean")]


@pytest.mark.parametrize(("method", "operator", "noise"), ALONE)
def test_a_volume_whose_slices_are_alone_is_restored_as_they_are(tiny, method, operator, noise):
    """The same random numbers, measurements and steps, whatever the network sees at once."""
    x = torch.rand(2, 3, 32, 32) * 1.6 - 0.8
    sigma = 0.0 if noise == "clean" else 0.05
    measurement = Measurement(SLICEWISE[operator], NoiseConfig(noise, sigma), True)
    schedule = replace(read_schedule("diffusion.yaml"), timestep_respacing=3)
    shared = {"method": method, "schedule": schedule, "num_samples": 2, "seed": 3}
    whole = restore(
        x, measurement, tiny, names=["v", "w"], volume=AsVolume(chunk=2, spacing=2.5), **shared
    )
    slices = restore(
        x.reshape(6, 1, 32, 32),
        measurement,
        tiny,
        names=[f"{v}_z{i:03d}" for v in "vw" for i in range(3)],
        places=[Place(v, 2.5 * i) for v in "vw" for i in range(3)],
        **shared,
    )
    expected = slices.samples.reshape(2, 3, 2, 32, 32).swapaxes(1, 2)
    solved = 0.02 if operator == "mri" else 1e-4  # where conjugate gradients stop
    np.testing.assert_allclose(whole.samples, expected, atol=solved)
    assert whole.finite.all()
    y = np.concatenate(whole.measurements)[:, None]
    np.testing.assert_allclose(y, np.stack(slices.measurements), atol=1e-6)


def test_one_step_sees_all_three_planes_and_their_mean_counts():
    """A network that says which plane it saw, by the size of what it was shown."""

    def network(x, timesteps):
        return torch.full_like(x, float(x.shape[2] * x.shape[3]))

    way = AsVolume(chunk=2, in_turn=True)
    x = torch.zeros(1, 4, 5, 6)
    at_once = way.network(network, steps=1)
    for _ in range(2):
        output = at_once(x, torch.zeros(1, dtype=torch.int64))
        torch.testing.assert_close(output, torch.full_like(x, (30 + 24 + 20) / 3))
    in_turn = way.network(network, steps=3)
    seen = [in_turn(x, torch.zeros(1, dtype=torch.int64)).mean().item() for _ in range(4)]
    assert seen == [30, 24, 20, 30]


def test_gradients_hold_one_chunk_of_the_network_at_a_time():
    """What autograd keeps between forward and backward is what went into the network, no more."""
    layers = torch.nn.Sequential(*[torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(20)])
    volume = torch.rand(1, 30, 16, 16, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sliced = AsVolume(chunk=2).network(lambda x, t: layers(x), steps=10)
        output = sliced(volume, torch.zeros(1, dtype=torch.int64))
    assert sum(kept) < 3 * volume.numel()
    (gradient,) = torch.autograd.grad(output.square().sum(), volume)
    images = volume.detach().reshape(30, 1, 16, 16).requires_grad_()
    (expected,) = torch.autograd.grad(layers(images).square().sum(), images)
    torch.testing.assert_close(gradient.reshape(30, 1, 16, 16), expected)


class Stop(Exception):
    """As if the process were killed."""


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_volume_that_was_stopped_goes_on_where_it_was_with_the_same_bytes(
    tiny, tmp_path, monkeypatch, method
):
    monkeypatch.setattr("guided_diffusion.sampling.COST", float("inf"))  # after every step
    x = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    operator = OperatorConfig("super_resolution", {"scale_factor": 2})
    measurement = Measurement(operator, NoiseConfig(sigma=0.05), True)
    shared = {"method": method, "schedule": "diffusion.yaml", "names": ["v"]}
    way = AsVolume(chunk=16, spacing=1.0, in_turn=True)
    state = str(tmp_path / "states" / "v.pt")

    def run(stop_at=None, file=state, steps=None):
        def watch(left, total, x):
            if steps is not None:
                steps.append(left)
            if left == stop_at:
                raise Stop

        return restore(x, measurement, tiny, volume=way, watch=watch, state_file=file, **shared)

    whole = run(file=None).samples
    for stop_at in (4, 2):  # before the state of this step is written
        with pytest.raises(Stop):
            run(stop_at)
    steps = []
    resumed = run(steps=steps)
    assert steps == [6, 2, 1, 0]
    assert resumed.samples.tobytes() == whole.tobytes()
    finished = []
    assert run(steps=finished).samples.tobytes() == whole.tobytes()
    assert finished == [6]
    for content in (b"", b"damaged"):
        with open(state, "wb") as file:
            file.write(content)
        assert run().samples.tobytes() == whole.tobytes()
    other = restore(
        x + 0.1, measurement, tiny, volume=way, state_file=state, **shared
    ).samples  # not taken for the same
    assert np.abs(other - whole).max() > 0.01


def test_a_volume_that_was_stopped_goes_on_at_the_sample_it_was_at(tiny, tmp_path, monkeypatch):
    """The first sample is done, the second in work, the third not begun."""
    monkeypatch.setattr("guided_diffusion.sampling.COST", float("inf"))
    x = torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    measurement = Measurement(SLICEWISE["denoise"], NoiseConfig(sigma=0.05), True)
    state = str(tmp_path / "v.pt")

    def run(stop_at=None, file=state):
        seen = []

        def watch(left, total, x):
            seen.append(left)
            assert total == 18 and len(x) == 1  # six steps of each sample, one in memory
            if left == stop_at:
                raise Stop

        how = {"names": ["v"], "num_samples": 3, "volume": AsVolume(), "watch": watch}
        found = restore(
            x, measurement, tiny, "ddrm", "diffusion.yaml", state_file=file, **how
        ).samples
        return found, seen

    whole, _ = run(file=None)
    with pytest.raises(Stop):
        run(8)
    resumed, seen = run()
    assert seen == [18, *range(8, -1, -1)]  # the start, then what is left
    assert resumed.tobytes() == whole.tobytes()


def test_a_run_that_is_killed_between_steps_takes_up_its_volume(tiny_run, monkeypatch):
    """What is restored after the kill has the bytes of a run without it, and no state is left."""
    monkeypatch.setattr("guided_diffusion.sampling.COST", float("inf"))
    write_nifti("v.nii", ball((32, 32, 20), np.array([15.0, 17, 9]), np.ones(3), 8.0))
    thick_task("v.nii", thickness=4)
    assert tiny_run("--save_dir", "once") == 0
    kept = Kept.keep

    def killed(self, left, x):
        kept(self, left, x)
        if left == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Kept, "keep", killed)
        assert tiny_run("--save_dir", "twice") == 130
    out = "tiny/thick_slices/4mm/0.05"
    assert os.listdir(f"twice/{out}/unfinished") == ["v.pt"]
    assert tiny_run("--save_dir", "twice") == 0
    assert not os.path.exists(f"twice/{out}/unfinished")
    both = [np.load(f"{folder}/{out}/slices/v.npy") for folder in ("once", "twice")]
    assert both[0].tobytes() == both[1].tobytes()


def thick_task(root, measured=False, **params):
    operator = {"name": "thick_slices", **params}
    config = task(operator, root=root, conditioning={"method": "spectral"})
    config["data"]["measured"] = measured
    write_yaml("task.yaml", config)


def ball(shape, centre, sides, radius=6.0):
    """A bright ball of so many mm, smooth at its edge, on grey; its centre in voxels."""
    places = np.moveaxis(np.indices(shape).astype(float), 0, -1)
    distance = np.linalg.norm((places - centre) * sides, axis=-1)
    return (200 + 600 / (1 + np.exp(2 * (distance - radius)))).astype(np.float32)


def world_centre(voxels, affine):
    """The world position of the ball's centre of mass."""
    weights = np.clip(voxels - 400, 0, None)
    centre = [(np.indices(voxels.shape)[i] * weights).sum() / weights.sum() for i in range(3)]
    return nib.affines.apply_affine(affine, centre)


def written_by(items, fine, folder):
    """What is written of cubic interpolations to `fine` mm, as if they were the restored ones."""
    for item in items:
        volume = item.volume
        spacing = volume.spacing
        lengths = {"thickness": spacing, "spacing": spacing, "target_spacing": fine}
        operator = OPERATORS["thick_slices"]
        params = operator.check(lengths)
        depth = operator.restored_depth(len(volume.slices), params)
        os.makedirs(f"{folder}/slices", exist_ok=True)
        np.save(
            f"{folder}/slices/{item.name}.npy", operator.interpolated(item.read(), depth, params)
        )
    return list(write_volumes(items, {i.name for i in items}, str(folder), "a test", "settings"))


@pytest.mark.parametrize("affine", [np.diag([1, 1, 4, 1.0]), np.diag([-1, 1, -4, 1.0]), OBLIQUE])
@pytest.mark.parametrize("fine", [1.0, 0.9])
def test_a_landmark_stays_where_it_is_in_a_nifti_volume(tmp_path, affine, fine):
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    voxels = ball((24, 26, 11), np.array([11.3, 14.2, 5.4]), sides)
    write_nifti(tmp_path / "a.nii", voxels, affine)
    volume = items_of({"root": str(tmp_path / "a.nii"), "axis": 2})[0].volume
    [(line, failed)] = written_by([Whole(volume, fine)], fine, tmp_path)
    assert not failed, line
    image = nib.load(tmp_path / "volumes/a.nii.gz")
    before, after = world_centre(voxels, affine), world_centre(image.get_fdata(), image.affine)
    assert np.abs(before - after).max() < 0.1 * fine
    zooms = image.header.get_zooms()
    assert zooms[2] == pytest.approx(fine) and image.shape[2] == np.ceil(
        11 * sides[2] / fine - 1e-6
    )
    # The first and the last slice are covered as acquired, and no more than a slice beyond.
    ends = [nib.affines.apply_affine(affine, [0, 0, k]) for k in (-0.5, 10.5)]
    inverse = np.linalg.inv(image.affine)
    low, high = (nib.affines.apply_affine(inverse, end)[2] for end in ends)
    assert -0.5 - 1e-5 < low < 0.5 and -0.5 - 1e-5 < image.shape[2] - 1 - high < 0.5


def test_a_landmark_stays_where_it_is_in_a_series(tmp_path):
    voxels = ball((24, 26, 11), np.array([11.3, 14.2, 5.4]), np.array([0.5, 0.75, 3.0]), 4.0)
    write_series(tmp_path / "s", voxels, SpacingBetweenSlices=3)
    volume = items_of({"root": str(tmp_path / "s")})[0].volume
    assert volume.spacing == pytest.approx(3) and volume.plane.thickness == 3
    [(line, failed)] = written_by([Whole(volume, 0.7)], 0.7, tmp_path)
    assert not failed, line

    def centre(folder, values):
        total, weight = np.zeros(3), 0.0
        for name, pixels in zip(sorted(os.listdir(folder)), values, strict=True):
            header = pydicom.dcmread(f"{folder}/{name}")
            weights = np.clip(pixels - 400, 0, None)
            rows, cols = np.indices(weights.shape)
            along = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            down, right = (float(v) for v in header.PixelSpacing)
            places = (
                np.array(header.ImagePositionPatient, float)
                + cols[..., None] * right * along[0]
                + rows[..., None] * down * along[1]
            )
            total, weight = (
                total + (weights[..., None] * places).sum((0, 1)),
                weight + weights.sum(),
            )
        return total / weight

    source = [
        pydicom.dcmread(tmp_path / "s" / n).pixel_array.astype(float)
        for n in sorted(os.listdir(tmp_path / "s"))
    ]
    before = centre(tmp_path / "s", source)
    result = tmp_path / "volumes/s"
    assert np.abs(centre(result, series_values(result)) - before).max() < 0.07
    headers = [pydicom.dcmread(result / n) for n in sorted(os.listdir(result))]
    assert len(headers) == 48  # of 0.7 mm, of 33 mm
    assert len({h.SOPInstanceUID for h in headers}) == 48
    assert {float(h.SliceThickness) for h in headers} == {0.7}
    assert [int(h.InstanceNumber) for h in headers] == list(range(1, 49))
    steps = np.diff([np.array(h.ImagePositionPatient, float) for h in headers], axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 0.7, rtol=1e-4)


def test_a_measured_volume_of_thick_slices_is_restored_on_the_fine_grid(tiny_run):
    voxels = ball((32, 34, 6), np.array([15.0, 17, 2.6]), np.array([1, 1, 4]), 8.0)
    write_nifti("images/a.nii.gz", voxels)
    for name in ("a1", "a2", "a10"):
        os.remove(f"images/{name}.png")
    thick_task("images", measured=True)
    assert tiny_run("--save_dir", "out", "--batch_size", "5", "--output", "thin.nii.gz") == 0
    assert nib.load("thin.nii.gz").shape == (32, 34, 24)
    out = "out/tiny/thick_slices/header/0.05"
    image = nib.load(f"{out}/volumes/a.nii.gz")
    assert image.shape == (32, 34, 24)
    assert image.header.get_zooms()[2] == 1
    with open(f"{out}/metrics.csv", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row["image"] == "a" and float(row["residual"]) > 0
    assert sorted(os.listdir(out)) == [
        *("comparison.png", "cubic", "input", "metrics.csv", "recon", "report", "report.html"),
        *("residual", "slices", "summary.json", "volumes"),
    ]
    stamp = os.stat(f"{out}/slices/a.npy").st_mtime_ns
    assert tiny_run("--save_dir", "out", "--batch_size", "5") == 0  # resumed: nothing is left to do
    assert os.stat(f"{out}/slices/a.npy").st_mtime_ns == stamp


def test_a_simulated_volume_has_a_truth_and_its_own_grid(tiny_run):
    voxels = ball((32, 32, 20), np.array([15.0, 17, 9]), np.ones(3), 8.0)
    write_nifti("v.nii", voxels, np.diag([1, 1, 1, 1.0]))
    thick_task("v.nii", thickness=4, spacing=5)
    assert tiny_run("--save_dir", "out", "--num_samples", "2") == 0
    out = "out/tiny/thick_slices/4mm_every_5mm/0.05"
    assert nib.load(f"{out}/volumes/v.nii.gz").shape == (32, 32, 20)
    assert nib.load(f"{out}/std/v.nii.gz").get_fdata().min() >= 0
    with open(f"{out}/metrics.csv", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert float(row["psnr"]) > 5 and float(row["sample_psnr"]) > 5


def test_pixels_that_are_far_from_square_keep_to_the_slices_plane_and_say_so(tiny_run, capsys):
    write_nifti("v.nii", ball((32, 32, 20), np.array([15.0, 17, 9]), np.ones(3), 8.0),
                np.diag([1, 1.7, 1.7, 1.0]))  # fmt: skip
    thick_task("v.nii", thickness=4)
    assert tiny_run("--save_dir", "out") == 0
    assert "planes are not taken in turn" in capsys.readouterr().err


def test_thick_slices_of_a_picture_are_refused(tiny_run, capsys):
    thick_task("images", thickness=4)
    assert tiny_run("--save_dir", "out") == 2
    assert "thick_slices restores volumes (NIfTI, DICOM) as a whole" in capsys.readouterr().err


def test_a_series_with_a_missing_slice_is_named_with_where(tiny_run, capsys):
    voxels = ball((32, 32, 6), np.array([15.0, 17, 3]), np.ones(3), 8.0)
    write_series("s", voxels)
    os.remove("s/6.dcm")  # the fourth
    thick_task("s", measured=True)
    assert tiny_run("--save_dir", "out") == 2
    error = capsys.readouterr().err
    assert "between slices 3 and 4 of 5, 6 mm" in error and "a slice is missing" in error
