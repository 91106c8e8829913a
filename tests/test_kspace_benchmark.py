"""What accelerated MRI is compared with: the classical methods reach their objectives' minima."""

import pytest
import torch

from guided_diffusion.operators import get_operator
from tests.benchmarks.kspace_classical import sense, total_variation, wavelet


def rnd(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    """(AᵀA, Aᵀy, A, y) of three coils and a 16×16 image."""
    operator = get_operator(
        "mri", (1, 16, 16), dtype=torch.float64, coils=3, acceleration=2, center_fraction=0.25
    )
    y = operator.forward(rnd(1, 1, 16, 16)) + 0.1 * rnd(1, *operator.out_shape, seed=1)
    return lambda u: operator.transpose(operator.forward(u)), operator.transpose(y), operator, y


def test_sense_solves_its_normal_equations(problem):
    normal, b, *_ = problem
    u = sense(normal, b, 0.05)
    assert (normal(u) + 0.05 * u - b).norm() < 1e-4 * b.norm()


def test_total_variation_is_at_its_minimum(problem):
    normal, b, operator, y = problem
    weight = 0.05

    def objective(u):
        steps = (u.roll(-1, axis) - u for axis in (-1, -2))
        return (operator.forward(u) - y).square().sum() / 2 + weight * sum(
            s.abs().sum() for s in steps
        )

    u = total_variation(normal, b, weight, steps=4000)
    least = objective(u)
    for seed in range(20):
        for size in (1e-3, 1e-2, 0.1):
            assert objective(u + size * rnd(*u.shape, seed=seed)) > least
    assert objective(total_variation(normal, b, weight, steps=8000)) > least * (1 - 1e-4)


def test_wavelets_of_a_complete_scan_are_soft_thresholded():
    """With AᵀA = I the minimum is known: W⁻¹ of the shrunken W b, the coarsest level as it was."""
    pywt = pytest.importorskip("pywt")
    b = rnd(1, 1, 32, 32)
    found = wavelet(lambda u: u, b, 0.3)
    levels = pywt.wavedec2(b[0, 0].numpy(), "db4", mode="periodization", level=4)
    for i, details in enumerate(levels[1:], start=1):
        levels[i] = tuple(pywt.threshold(d, 0.3, "soft") for d in details)
    expected = pywt.waverec2(levels, "db4", mode="periodization")
    assert torch.allclose(found[0, 0], torch.from_numpy(expected))
