"""The operator of accelerated MRI: published values, a direct computation, and its own algebra."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from guided_diffusion.dct import dct_matrix
from guided_diffusion.methods.start import useful_levels
from guided_diffusion.operators import solver
from guided_diffusion.operators.fourier import fft2c, ifft2c
from guided_diffusion.operators.masks import cartesian_mask
from guided_diffusion.operators.mri import from_hybrid, to_hybrid
from guided_diffusion.operators.one_coil import OneCoil, OneCoilPoints
from guided_diffusion.operators.scanned import kspace_of, points_of
from guided_diffusion.operators.several_coils import Coils, CompleteCoils, Points
from guided_diffusion.operators.solver import EVERYWHERE, LOCAL
from guided_diffusion.scan import first_amplitude
from guided_diffusion.statistics import PriorStatistics

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "kspace.npz")
SIZES = ("16x12", "15x11", "16x11", "15x12")
AXES = ("columns", "rows")


def golden(size, key):
    return torch.from_numpy(GOLDEN[f"op/{size}/{key}"])


def build(kind, axis="columns", height=15, width=12, seed=0):
    """A small operator of `KINDS`, of random maps, in double precision."""
    coils, measured = kind
    random = torch.Generator().manual_seed(seed)
    maps = torch.randn(coils, height, width, dtype=torch.complex128, generator=random)
    if measured == "points":
        points = np.random.default_rng(seed).random((height, width)) < 0.4
        if coils == 1:
            return OneCoilPoints((1, height, width), points, dtype=torch.float64)
        return Points(points, maps, dtype=torch.float64)
    lines = {"columns": width, "rows": height}[axis]
    if measured == "all":
        return CompleteCoils(np.ones(lines, bool), maps, axis, dtype=torch.float64)
    mask = cartesian_mask("random", lines, 2, 0.2, seed)
    if coils == 1:
        return OneCoil.of_lines((1, height, width), mask, axis, dtype=torch.float64)
    return Coils(mask, maps, axis, 0.0, dtype=torch.float64)


KINDS = [(1, "lines"), (3, "lines"), (3, "all"), (1, "points"), (3, "points")]
with_svd = pytest.mark.parametrize("kind", KINDS[:-1])
every_kind = pytest.mark.parametrize("kind", KINDS)


def randn(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=random)


@pytest.mark.parametrize("size", SIZES)
def test_the_transform_is_fastmris(size):
    z = golden(size, "z")
    assert torch.allclose(fft2c(z), golden(size, "fastmri_fft2c"), atol=1e-6)
    assert torch.allclose(ifft2c(z), golden(size, "fastmri_ifft2c"), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_coils_equal_deepinvs_multicoil_mri(size):
    """deepinv measures the complex z; ours the real x, with z's phase in the maps."""
    z, maps, mask = (golden(size, k) for k in ("z", "maps", "mask"))
    x = golden(size, "x")
    phase = z / torch.where(x == 0, 1, x)
    operator = Coils(mask, maps * phase, "columns", 0.0, dtype=torch.float64)
    y = operator.forward(x[None, None])
    published = golden(size, "deepinv_multi_y")
    assert torch.allclose(from_hybrid(y, mask), published[None], atol=1e-6)
    adjoint = (phase.conj() * golden(size, "deepinv_multi_aty")).real
    again = operator.transpose(to_hybrid(published[None], mask))
    assert torch.allclose(again[0, 0], adjoint, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_one_coil_equals_the_real_part_of_deepinvs_mri(size):
    """y is linear in the object, so deepinv's y of z is ours of Re z plus i times that of Im z."""
    z, mask = golden(size, "z"), golden(size, "mask")
    operator = OneCoil.of_lines((1, *z.shape), mask, "columns", dtype=torch.float64)
    real, imag = (from_hybrid(operator.forward(p[None, None]), mask) for p in (z.real, z.imag))
    published = golden(size, "deepinv_mri_y")
    assert torch.allclose((real + 1j * imag)[0, 0], published, atol=1e-6)
    back = operator.transpose(to_hybrid(published[None, None], mask))
    assert torch.allclose(back[0, 0], golden(size, "deepinv_mri_aty").real, atol=1e-6)


@pytest.mark.parametrize("size", ["256x320", "255x321"])
def test_large_images_of_four_coils(size):
    height, width = map(int, size.split("x"))
    r, c = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (height, width)), indexing="ij"
    )
    inside = (r - height // 3) ** 2 + (c - width // 2 - 1) ** 2 < (min(height, width) / 4) ** 2
    x = torch.cos(0.31 * r + 0.2) * torch.sin(0.17 * c + 0.05 * r)
    x = x + 0.01 * r - 0.02 * c + 1.0 * inside
    r, c = torch.meshgrid(
        *(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width)), indexing="ij"
    )
    angles = (2 * torch.pi * torch.arange(4) / 4).double()[:, None, None]
    sin, cos = angles.sin(), angles.cos()
    maps = torch.exp(-((r - 1.2 * sin) ** 2 + (c - 1.2 * cos) ** 2) / 2)
    maps = maps * torch.exp(1j * (0.7 * angles + 0.9 * r * cos + 0.6 * c * sin))
    maps = maps / maps.abs().square().sum(0).sqrt()
    mask = torch.zeros(width, dtype=torch.bool)
    published = {k: GOLDEN[f"big/{size}/{k}"] for k in ("mask", "y_index", "y_value", "norms")}
    mask[published["mask"].astype(int)] = True
    operator = Coils(mask, maps, "columns", 0.0, dtype=torch.float64)
    y = operator.forward(x[None, None])
    kspace = from_hybrid(y, mask).flatten()
    assert np.allclose(kspace[published["y_index"]], published["y_value"], atol=1e-9)
    assert kspace.norm().item() == pytest.approx(published["norms"][0], rel=1e-9)
    back = operator.transpose(y).flatten()[GOLDEN[f"big/{size}/aty_index"]]
    assert np.allclose(back, GOLDEN[f"big/{size}/aty_value"].real, atol=1e-9)


def matrix(operator):
    """A, column by column, from `forward`."""
    size = operator.in_shape[1] * operator.in_shape[2]
    units = torch.eye(size, dtype=torch.float64).reshape(size, *operator.in_shape)
    return operator.forward(units).flatten(1).mT


@every_kind
@pytest.mark.parametrize("axis", AXES)
def test_transpose_and_normal(kind, axis):
    operator = build(kind, axis)
    x, y = randn(2, *operator.in_shape), randn(2, *operator.out_shape, seed=1)
    assert torch.allclose((operator.forward(x) * y).sum(), (x * operator.transpose(y)).sum())
    assert torch.allclose(operator.normal(x), operator.transpose(operator.forward(x)))
    expected = matrix(operator).square().sum(0).mean().item()
    assert operator.sight == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_points_are_those_of_the_transform(size):
    """Of an odd and an even side: A x against the published k-space, picked one by one."""
    z, mask = golden(size, "z"), np.random.default_rng(0).random(golden(size, "z").shape) < 0.3
    operator = Points(mask, z[None], dtype=torch.float64)
    y = operator.forward(torch.ones_like(z.real)[None, None])
    picked = golden(size, "fastmri_fft2c")[torch.from_numpy(mask)]
    assert torch.allclose(y.flatten(), torch.cat([picked.real, picked.imag]), atol=1e-6)
    k = kspace_of(y, torch.from_numpy(mask))
    assert torch.equal(points_of(k, torch.from_numpy(mask)), y)
    assert k[0, 0][~torch.from_numpy(mask)].abs().max() == 0


@with_svd
@pytest.mark.parametrize("axis", AXES)
class TestAlgebra:
    def test_singular_values_are_those_of_the_matrix(self, kind, axis):
        operator = build(kind, axis)
        expected = torch.zeros(operator.in_shape[1] * operator.in_shape[2]).double()
        values = torch.linalg.svdvals(matrix(operator))
        expected[: len(values)] = values
        found = operator.singular_values.flatten().sort(descending=True).values
        assert torch.allclose(found, expected[: len(found)], atol=1e-7)
        assert expected[len(found) :].abs().max() < 1e-7 if len(expected) > len(found) else True

    def test_a_is_u_sigma_vt(self, kind, axis):
        operator = build(kind, axis)
        x, y = randn(2, *operator.in_shape), randn(2, *operator.out_shape, seed=1)
        s = operator.singular_values
        assert torch.allclose(operator.U(s * operator.Vt(x)), operator.forward(x))
        assert torch.allclose(operator.V(s * operator.Ut(y)), operator.transpose(y))

    def test_v_and_u_are_orthonormal_and_transposes(self, kind, axis):
        operator = build(kind, axis)
        shape = operator.singular_values.shape
        a, b = randn(2, *shape), randn(2, *operator.out_shape, seed=1)
        seen = operator.singular_values > 1e-6
        a = torch.where(seen, a, 0.0)
        assert torch.allclose(operator.Vt(operator.V(a)), a)
        assert torch.allclose(torch.where(seen, operator.Ut(operator.U(a)), 0.0), a)
        assert torch.allclose((operator.U(a) * b).sum(), (a * operator.Ut(b)).sum())


@pytest.mark.parametrize("kind", [(1, "lines"), (3, "lines"), (3, "all")])
@pytest.mark.parametrize("axis", AXES)
def test_rows_are_the_transposed_image(kind, axis):
    """Phase encoding along rows is that along columns of the image mirrored in its diagonal."""
    other = {"rows": "columns", "columns": "rows"}[axis]
    operator, turned = build(kind, axis), build(kind, other, 12, 15)
    if kind[0] > 1:
        turned.__init__(operator.mask, operator.maps.mT, other, dtype=torch.float64)
    x = randn(1, *operator.in_shape)
    assert torch.allclose(turned.forward(x.mT).mT, operator.forward(x))


def test_directions_below_the_threshold_count_as_unseen():
    exact = build((3, "lines"))
    cut = Coils(exact.mask, exact.maps, "columns", threshold=1.0, dtype=torch.float64)
    assert torch.equal(exact.singular_values >= 1, cut.singular_values > 0)
    assert cut.Ut(randn(1, *cut.out_shape))[cut.singular_values[None] == 0].abs().max() == 0


def covariance(operator, variance):
    """Of images whose DCT coefficients have these variances, as a matrix."""
    rows, cols = (dct_matrix(n) for n in operator.in_shape[1:])
    D = torch.kron(rows, cols)
    return D.mT @ torch.diag(variance.flatten()) @ D


@pytest.mark.parametrize("kind", [(1, "lines"), (3, "all"), (1, "points")])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [(15, 12), (12, 15)])
def test_frequency_variance_is_the_diagonal_in_singular_directions(kind, axis, size):
    operator = build(kind, axis, *size).in_frequencies()
    variance = randn(*operator.in_shape[1:]).exp()
    shape = operator.singular_values.shape
    units = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    V = operator.V(units).flatten(1)
    expected = torch.einsum("ip,pq,iq->i", V, covariance(operator, variance), V)
    found = operator.frequency_variance(variance).expand(shape)
    assert torch.allclose(found.flatten(), expected)


def gaussian(A, C, sigma):
    return C @ A.mT @ torch.linalg.inv(A @ C @ A.mT + sigma**2 * torch.eye(len(A)))


@pytest.mark.parametrize("kind", [k for k in KINDS if k[1] != "all"])
class TestPosterior:
    """Conjugate gradients, run until they have converged, against matrices written out."""

    @pytest.fixture(autouse=True)
    def converged(self, monkeypatch):
        monkeypatch.setattr(solver, "TOLERANCE", 1e-9)
        monkeypatch.setattr(solver, "ITERATIONS", 400)

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize("of_each", ["image", "batch"])
    def test_mean_under_a_spectrum(self, kind, axis, of_each):
        """With the covariance C, then with L C L, L from the first mean by scipy's filter."""
        operator = build(kind, axis)
        variance = randn(*operator.in_shape[1:]).exp()
        x_0, y = randn(2, *operator.in_shape), randn(2, *operator.out_shape, seed=1)
        A, C = matrix(operator), covariance(operator, variance)
        residual = (y - operator.forward(x_0)).flatten(1)
        sigma = 0.3 if of_each == "image" else torch.full((2, 1, 1, 1), 0.3)
        found = operator.frequency_posterior_mean(x_0, operator.reduced(y), sigma, variance)
        for i in range(2):
            step = gaussian(A, C, 0.3) @ residual[i]
            square = step.reshape(operator.in_shape[1:]).square().numpy()
            local = gaussian_filter(square, LOCAL, mode="wrap", truncate=12)
            local = np.sqrt(EVERYWHERE + (1 - EVERYWHERE) * local / local.mean()).flatten()
            L = torch.diag(torch.from_numpy(local))
            expected = gaussian(A, L @ C @ L, 0.3) @ residual[i]
            error = (found - x_0)[i].flatten() - expected
            assert error.norm() < 1e-6 * expected.norm()
            assert (step - expected).norm() > 0.02 * expected.norm()

    def test_an_image_is_solved_for_as_if_it_were_alone(self, kind, monkeypatch):
        monkeypatch.setattr(solver, "TOLERANCE", 0.1)
        operator = build(kind)
        variance, y = randn(*operator.in_shape[1:]).exp(), randn(3, *operator.out_shape)
        y[1:] = operator.forward(100 * randn(2, *operator.in_shape).cumsum(-1))
        x_0 = torch.zeros(3, *operator.in_shape, dtype=torch.float64)

        def mean(rows):
            reduced = operator.reduced(y[rows])
            return operator.frequency_posterior_mean(x_0[rows], reduced, 0.1, variance)

        alone = torch.cat([mean([i]) for i in range(3)])
        assert torch.allclose(mean([0, 1, 2]), alone, rtol=1e-9, atol=1e-9)

    def test_score_and_mean_of_one_variance(self, kind):
        operator, variance = build(kind), 0.7
        A, x, y = matrix(operator), randn(2, *operator.in_shape), randn(2, *operator.out_shape)
        residual = (y - operator.forward(x)).flatten(1)
        expected = gaussian(A, variance * torch.eye(A.shape[1], dtype=torch.float64), 0.3)
        expected = (residual @ expected.mT).reshape(x.shape)
        score = operator.score(x, operator.reduced(y), 0.3, variance)
        mean = operator.posterior_mean(x, operator.reduced(y), 0.3, variance)
        assert (variance * score - expected).norm() < 1e-6 * expected.norm()
        assert (mean - x - expected).norm() < 1e-6 * expected.norm()

    def test_noise_fills_up_what_the_prior_leaves(self, kind):
        """(r I - C)₊, by its square root and as a product."""
        operator = build(kind)
        variance, r, x = randn(*operator.in_shape[1:]).exp(), 1.3, randn(2, *operator.in_shape)
        spread, C = operator.spread(variance, 0.3), covariance(operator, variance)
        values, vectors = torch.linalg.eigh(r * torch.eye(len(C)) - C)
        left = values.clamp(min=0)
        for found, weights in ((spread.remainder, left), (spread.fill, left.sqrt())):
            expected = x.flatten(1) @ (vectors * weights) @ vectors.mT
            assert torch.allclose(found(x, r).flatten(1), expected, atol=1e-6)

    def test_draws_have_the_posterior_s_covariance(self, kind):
        """A draw is linear in its noise: unit vectors in the noise's place give its matrix."""
        operator, r = build(kind, height=8, width=6), 0.2
        variance = randn(*operator.in_shape[1:]).exp()
        A, C = matrix(operator), covariance(operator, variance)
        P = C - gaussian(A, C, 0.3) @ A @ C
        size = len(C)
        draws = 2 + -(-A.shape[0] // size)  # of r, of C, and so many for y's noise
        units = iter(torch.eye(draws * size, dtype=torch.float64).split(size, dim=1))
        x = torch.zeros(draws * size, *operator.in_shape, dtype=torch.float64)
        found = operator.spread(variance, 0.3).draw(x, r, lambda x: next(units).reshape(x.shape))
        found = found.flatten(1)
        assert torch.allclose(found.mT @ found, P + r * torch.eye(size), atol=1e-6)


class TestFirstLevel:
    """How much y leaves open of the band of frequencies that it tells least of."""

    LAW = PriorStatistics(-0.8, (1.0, 400.0), (300.0, 300.0 / 400**2), "1/f²")

    @pytest.mark.parametrize("kind", [k for k in KINDS if k[1] != "all"])
    def test_it_is_that_of_the_dense_posterior(self, kind):
        operator, sigma = build(kind, height=24, width=20), 0.3
        power = self.LAW.power_spectrum(24, 20)
        A, C = matrix(operator), covariance(operator, power)
        rows, cols = (dct_matrix(n) for n in (24, 20))
        D = torch.kron(rows, cols)
        P = (D @ (C - gaussian(A, C, sigma) @ A @ C) @ D.mT).diagonal().reshape(24, 20)
        radius = torch.hypot(torch.arange(24.0)[:, None], torch.arange(20.0))
        edges = [0, *(2 ** (i / 2) for i in range(5, 11))]
        bands = [(radius >= a) & (radius < b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        expected = max(P[band].mean().sqrt().item() for band in bands if band.any())
        assert operator.widest_std(self.LAW, sigma) == pytest.approx(expected, rel=0.4)

    def test_with_the_phase_unknown_it_is_the_images_amplitude_where_the_centre_ends(self):
        """Five cycles in 40 lines, ten half cycles, is the first frequency that is not measured."""
        lines = np.zeros(40, bool)
        lines[15:26] = lines[::4] = True
        lines[14], lines[26] = False, False
        points = np.zeros((40, 40), bool)
        points[18:23, 15:26] = True  # two cycles in rows, five in columns
        for mask, cycles in ((lines, 5), (points, 2)):
            frequency = 2 * cycles * 256 / 40
            assert first_amplitude(mask, self.LAW) == pytest.approx((300 / frequency**2) ** 0.5)

    def test_fewer_coils_leave_more_open(self):
        mask, maps = cartesian_mask("equispaced", 64, 4, 0.1, 0), torch.randn(6, 64, 64) + 0j
        levels = [Coils(mask, maps[:n]).widest_std(self.LAW, 0.01) for n in (1, 3, 6)]
        assert levels[0] > 2 * levels[1] > 4 * levels[2]

    def test_a_complete_scan_leaves_its_noise(self):
        assert build((3, "all")).widest_std(self.LAW, 0.1) == float("inf")
        mask = np.ones(16, bool)
        maps = torch.randn(4, 16, 16, dtype=torch.complex64)
        unit = CompleteCoils(mask, maps / maps.abs().square().sum(0).sqrt())
        assert useful_levels(unit, 0.1, statistics=self.LAW) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("axis", AXES)
def test_hybrid_space_is_k_space_of_the_measured_lines(axis):
    k = randn(3, 15, 12) + 1j * randn(3, 15, 12, seed=1)
    mask = cartesian_mask("random", {"columns": 12, "rows": 15}[axis], 2, 0.2, 0)
    measured = k * torch.from_numpy(mask if axis == "columns" else mask[:, None])
    assert torch.allclose(from_hybrid(to_hybrid(k, mask, axis), mask, axis), measured)


def test_eight_coils_of_256_lines_are_decomposed_within_seconds():
    mask = cartesian_mask("equispaced_fraction", 256, 4, 0.08, 0)
    maps = torch.randn(8, 256, 256, dtype=torch.complex64)
    start = time.process_time()
    assert Coils(mask, maps, "columns", 0.0).singular_values.shape == (1, 256, 256)
    assert time.process_time() - start < 6
