"""Degradation operators against direct computations, and noise against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guided_diffusion.measurements import get_noise, get_operator
from tests.conftest import rnd
from util.errors import UserError
from util.random import ImageRandom, image_generator

OPERATORS = [
    {"name": "denoise"},
    {"name": "super_resolution", "scale_factor": 2},
    {"name": "super_resolution", "scale_factor": 4, "type": "bicubic"},
    {"name": "super_resolution", "scale_factor": 8},
    {"name": "super_resolution", "scale_factor": 4, "type": "standard"},
    {"name": "deblur", "type": "gaussian", "kernel_size": 61, "intensity": 3.0},
    {"name": "deblur", "type": "gaussian", "kernel_size": 7, "intensity": 1.0},
    {"name": "deblur", "type": "uniform", "kernel_size": 9},
    {"name": "deblur", "type": "uniform", "kernel_size": 4},
    {"name": "deblur", "type": "aniso", "kernel_size": 9, "intensity": [4.0, 0.7]},
    {"name": "color"},
    {"name": "deblur", "type": "uniform", "kernel_size": 9, "boundary": "reflect"},
    {"name": "deblur", "type": "uniform", "kernel_size": 4, "boundary": "reflect"},
    {"name": "deblur", "intensity": 3.0, "boundary": "reflect"},
]
IDS = ["-".join(str(v) for v in o.values()) for o in OPERATORS]
SHAPES = [(3, 40, 56), (3, 64, 32), (3, 37, 50)]


def make(params, shape, **more):
    return get_operator(**{**params, "in_shape": shape, "dtype": torch.float64, **more})


def draw(shape, seed):
    return rnd(shape, seed).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("params", OPERATORS, ids=IDS)
class TestEveryOperator:
    def test_adjoint(self, params, shape):
        operator = make(params, shape)
        x, y = draw((2, *operator.in_shape), 1), draw((2, *operator.out_shape), 2)
        left, right = (operator.forward(x) * y).sum(), (x * operator.transpose(y)).sum()
        torch.testing.assert_close(left, right)

    def test_singular_vectors_are_orthonormal(self, params, shape):
        operator = make(params, shape)
        z = draw((1, *operator.singular_values.shape), 3)
        torch.testing.assert_close(operator.Vt(operator.V(z)), z)
        torch.testing.assert_close(operator.Ut(operator.U(z)), z)

    def test_svd_is_that_of_the_operator(self, params, shape):
        operator = make(params, shape)
        x = draw((1, *operator.in_shape), 4)
        spectrum = operator.singular_values * operator.Vt(x)
        torch.testing.assert_close(operator.Ut(operator.forward(x)), spectrum)
        assert (operator.singular_values >= 0).all()

    def test_a_batch_is_its_images(self, params, shape):
        operator = make(params, shape)
        x = draw((3, *operator.in_shape), 5)
        alone = torch.cat([operator.forward(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(operator.forward(x), alone)

    def test_grey_stays_grey(self, params, shape):
        operator = make(params, shape)
        grey = draw((1, 1, *shape[1:]), 6).expand(1, *shape)
        y = operator.forward(grey)
        torch.testing.assert_close(y, y[:, :1].expand_as(y))
        back = operator.transpose(y)
        if params["name"] != "color":
            torch.testing.assert_close(back, back[:, :1].expand_as(back))

    def test_channels_are_independent(self, params, shape):
        if params["name"] == "color":
            pytest.skip("color mixes channels")
        x = draw((1, *shape), 7)
        one = make(params, (1, *shape[1:]))
        separately = torch.cat([one.forward(x[:, c : c + 1]) for c in range(3)], dim=1)
        torch.testing.assert_close(make(params, shape).forward(x), separately)


def gaussian(taps, std):
    kernel = np.exp(-0.5 * ((np.arange(taps) - taps // 2) / std) ** 2)
    return kernel / kernel.sum()


@pytest.mark.parametrize(
    ("params", "rows", "cols"),
    [
        (OPERATORS[5], gaussian(31, 3.0), gaussian(31, 3.0)),
        (OPERATORS[6], gaussian(4, 1.0), gaussian(4, 1.0)),
        (OPERATORS[7], np.full(9, 1 / 9), np.full(9, 1 / 9)),
        (OPERATORS[9], gaussian(5, 4.0), gaussian(5, 0.7)),
    ],
)
def test_blur_equals_conv2d(params, rows, cols):
    x = draw((2, 3, 48, 40), 8)
    kernel = torch.from_numpy(np.outer(rows, cols)).expand(3, 1, -1, -1)
    top, left = len(rows) // 2, len(cols) // 2
    padded = F.pad(x, (left, len(cols) - 1 - left, top, len(rows) - 1 - top))
    direct = F.conv2d(padded, kernel, groups=3)
    exact = make(params, (3, 48, 40), singular_value_threshold=0.0).forward(x)
    torch.testing.assert_close(exact, direct)
    published = make(params, (3, 48, 40)).forward(x)
    # Cutting singular values below 0.03 changes a factor by at most 0.03 in operator norm.
    assert (published - direct).norm() <= 2 * 0.031 * x.norm()


@pytest.mark.parametrize("params", OPERATORS[-3:], ids=IDS[-3:])
@pytest.mark.parametrize("size", [48, 10])  # 10: the reflection is reflected in its turn
def test_a_reflecting_blur_sees_the_mirror_image(params, size):
    taps = {9: np.full(9, 1 / 9), 4: np.full(4, 1 / 4)}.get(
        params.get("kernel_size"), gaussian(31, 3.0)
    )
    x = draw((2, 1, size, 40), 12)
    before, after = len(taps) // 2, len(taps) - 1 - len(taps) // 2
    padding = ((0, 0), (0, 0), (before, after), (before, after))
    padded = torch.from_numpy(np.pad(x.numpy(), padding, mode="symmetric"))
    direct = F.conv2d(padded, torch.from_numpy(np.outer(taps, taps))[None, None])
    operator = make(params, (1, size, 40), singular_value_threshold=0.0)
    torch.testing.assert_close(operator.forward(x), direct)
    flat = torch.ones(1, 1, size, 40, dtype=torch.float64)
    torch.testing.assert_close(operator.forward(flat), flat)  # no dark frame


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_equals_a_strided_convolution(factor):
    x = draw((1, 2, 32, 64), 9)
    distance = np.abs((np.arange(4 * factor) - 2 * factor + 0.5) / factor)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    kernel = np.where(distance <= 1, near, far)
    kernel = torch.from_numpy(np.outer(kernel, kernel) / kernel.sum() ** 2).expand(2, 1, -1, -1)
    before, after = 2 * factor - factor // 2, 2 * factor
    padding = ((0, 0), (0, 0), (before, after), (before, after))
    padded = torch.from_numpy(np.pad(x.numpy(), padding, mode="symmetric"))
    direct = F.conv2d(padded, kernel, groups=2, stride=factor)[:, :, : 32 // factor, : 64 // factor]
    operator = make(
        {"name": "super_resolution", "scale_factor": factor},
        (2, 32, 64),
        singular_value_threshold=0.0,
    )
    torch.testing.assert_close(operator.forward(x), direct)


def test_bicubic_equals_published(golden, assert_golden):
    operator = get_operator("super_resolution", (1, 3, 256, 256), scale_factor=4)
    y = operator.forward(rnd((1, 3, 256, 256), 21).clamp(-1, 1))
    assert_golden("op_sr/H", y)
    assert_golden("op_sr/HtH", operator.transpose(y))
    s = operator.singular_values.flatten().sort(descending=True).values
    np.testing.assert_allclose(s[:: len(s) // 512][:512], golden["op_sr/s"], rtol=1e-5)


def test_standard_equals_average_pooling():
    x = draw((2, 3, 16, 24), 10)
    operator = make(OPERATORS[4], (3, 16, 24))
    torch.testing.assert_close(operator.forward(x), F.avg_pool2d(x, 4))


def test_color_is_the_mean_of_channels():
    x = draw((2, 3, 8, 8), 11)
    weights = torch.tensor([0.3333, 0.3334, 0.3333], dtype=torch.float64)
    expected = torch.einsum("c,nchw->nhw", weights, x)[:, None]
    torch.testing.assert_close(make({"name": "color"}, (3, 8, 8)).forward(x), expected)


def test_anisotropic_blur_has_its_directions():
    """The first intensity blurs along columns of pixels (vertically), the second along rows."""
    operator = make(OPERATORS[9], (1, 33, 33))
    impulse = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    impulse[0, 0, 16, 16] = 1
    spread = operator.forward(impulse)[0, 0]
    assert spread[18, 16] > 5 * spread[16, 18]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"name": "inpaint"}, "denoise, super_resolution"),
        ({"name": "super_resolution", "scale_factor": 3}, "scale_factor"),
        ({"name": "super_resolution", "type": "nearest"}, "nearest"),
        ({"name": "deblur", "type": "motion"}, "motion"),
        ({"name": "deblur", "type": "aniso", "intensity": 3.0}, "two positive"),
        ({"name": "deblur", "type": "gaussian", "intensity": -1.0}, "positive"),
        ({"name": "deblur", "kernel_size": 0}, "kernel_size"),
        ({"name": "deblur", "boundary": "wrap"}, "zero, reflect"),
        ({"name": "denoise", "kernel_size": 9}, "kernel_size"),
    ],
)
def test_operators_that_make_no_sense_are_refused(params, says):
    with pytest.raises(UserError, match=says):
        get_operator(**params, in_shape=(3, 40, 20))


def random_for(n):
    return ImageRandom([image_generator(str(i), "measurement", 0) for i in range(n)])


def test_gaussian_noise_has_its_sigma():
    y = torch.zeros(2, 1, 256, 256)
    noisy = get_noise("gaussian", 0.2)(y, random_for(2))
    assert noisy.std().item() == pytest.approx(0.2, rel=0.01)
    assert not torch.equal(noisy[0], noisy[1])


def test_clean_noise_changes_nothing():
    y = rnd((1, 1, 8, 8), 1)
    noise = get_noise("clean", 0.3)
    assert noise.sigma == 0
    assert torch.equal(noise(y, random_for(1)), y)


def test_poisson_noise_follows_the_signal():
    """Standard deviation σ over an image, variance proportional to brightness, no bias."""
    y = torch.cat([torch.full((2, 1, 256, 128), -0.8), torch.full((2, 1, 256, 128), 0.6)], dim=3)
    error = get_noise("poisson", 0.1)(y, random_for(2)) - y
    assert error.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.02)
    dark, bright = error[..., :128].var().item(), error[..., 128:].var().item()
    assert bright / dark == pytest.approx(1.6 / 0.2, rel=0.05)
    assert abs(error.mean().item()) < 2e-3
    assert not torch.equal(error[0], error[1])


def test_poisson_noise_leaves_black_alone():
    y = torch.full((1, 1, 8, 8), -1.2)
    assert torch.equal(get_noise("poisson", 0.1)(y, random_for(1)), y)


def test_rician_noise_has_the_moments_of_a_magnitude():
    """E[M²] = A² + 2σ², and far from black, σ itself; M and A counted from black."""
    y = torch.tensor([-1.0, -0.8, 0.5])[:, None, None, None].expand(3, 1, 256, 256)
    noisy = get_noise("rician", 0.1)(y, random_for(3))
    assert noisy.min() >= -1
    second = (noisy + 1).square().mean(dim=(1, 2, 3))
    expected = (y + 1).square().mean(dim=(1, 2, 3)) + 2 * 0.1**2
    torch.testing.assert_close(second, expected, rtol=0.02, atol=0)
    assert noisy[2].std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(
    ("name", "sigma"), [("salt", 0.1), ("gaussian", -0.1), ("gaussian", float("nan"))]
)
def test_noise_that_makes_no_sense_is_refused(name, sigma):
    with pytest.raises(UserError, match="measurement.noise"):
        get_noise(name, sigma)
