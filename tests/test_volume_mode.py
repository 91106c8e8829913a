"""Volumes restored as a whole: planes in turn, one path with slices, and runs that stop."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig, read_schedule
from guided_diffusion.methods import METHODS
from guided_diffusion.restoration import restore
from guided_diffusion.sampling import Kept
from guided_diffusion.volumes import AsVolume
from tests.conftest import task, write_yaml
from tests.volume_files import ball, head, thick_task, write_nifti
from util.random import Place


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
ALONE = [(method, "sr", "gaussian", {}) for method in METHODS]
ALONE += [("spectral", operator, "gaussian", {}) for operator in SLICEWISE if operator != "sr"]
ALONE += [("ddrm", "denoise", "rician", {}), ("ddnm", "denoise", "clean", {})]
ALONE += [("dmps", "sr", "gaussian", {"dynamic_threshold": True})]


@pytest.mark.parametrize(("method", "operator", "noise", "bounds"), ALONE)
def test_a_volume_whose_slices_are_alone_is_restored_as_they_are(
    tiny, method, operator, noise, bounds
):
    """The same random numbers, measurements and steps, whatever the network sees at once."""
    x = torch.rand(2, 3, 32, 32) * 1.6 - 0.8
    sigma = 0.0 if noise == "clean" else 0.05
    measurement = Measurement(SLICEWISE[operator], NoiseConfig(noise, sigma), True)
    schedule = replace(read_schedule("diffusion.yaml"), timestep_respacing=3, **bounds)
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


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_a_blurred_volume_needs_no_kernel_size(tiny_run, kind):
    write_nifti("a.nii", head())
    write_yaml("task.yaml", task({"name": "deblur", "type": kind, "intensity": 1.0}, root="a.nii"))
    assert tiny_run("--save_dir", "out") == 0
    assert os.listdir(f"out/tiny/deblur/{kind}/0.05/volumes") == ["a.nii.gz"]


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
