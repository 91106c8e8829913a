"""What every operator gives to the methods, against dense matrices; the registry."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators import OPERATORS, get_operator, restored_size, variant
from guided_diffusion.operators.separable import SeparableOperator, identity_factor, matrix_factor
from tests.conftest import rnd
from util.errors import UserError
from util.parameters import Parameter

SHAPE = (3, 6, 8)
TASKS = [
    {"name": "denoise"},
    {"name": "super_resolution", "scale_factor": 2},
    {"name": "deblur", "type": "gaussian", "kernel_size": 9, "intensity": 1.5},
    {"name": "deblur", "type": "uniform", "kernel_size": 3},
    {"name": "color"},
]
every_task = pytest.mark.parametrize("params", TASKS, ids=lambda p: p.get("type", p["name"]))


def make(params):
    return get_operator(**params, in_shape=SHAPE, dtype=torch.float64)


def dense(operator):
    """A as a matrix, column by column."""
    count = math.prod(operator.in_shape)
    basis = torch.eye(count, dtype=torch.float64).reshape(count, *operator.in_shape)
    return operator.forward(basis).reshape(count, -1).T


def draw(shape, seed):
    return rnd(shape, seed).double()


@every_task
def test_inverted_is_the_least_squares_solution_and_its_noise(params):
    operator, sigma = make(params), 0.2
    A, y = dense(operator), draw((2, *operator.out_shape), 1)
    mean, std = operator.inverted(operator.Ut(y), sigma)
    pinv = torch.linalg.pinv(A, rtol=1e-9)
    seen = operator.singular_values > 0
    solution = operator.V(torch.where(seen, mean, 0.0)).reshape(2, -1)
    torch.testing.assert_close(solution, y.reshape(2, -1) @ pinv.T)
    variance = torch.where(seen, std**2, 0.0).sum()
    torch.testing.assert_close(variance, sigma**2 * pinv.square().sum())
    assert (std[~seen] == math.inf).all()


@every_task
def test_a_correction_changes_what_is_measured_and_nothing_else(params):
    operator = make(params)
    A, x, other = dense(operator), draw((2, *SHAPE), 1), draw((2, *SHAPE), 2)
    corrected = x + operator.correction(x, operator.Vt(other))
    torch.testing.assert_close(operator.forward(corrected), operator.forward(other))
    unseen = torch.eye(A.shape[1]) - torch.linalg.pinv(A, rtol=1e-9) @ A
    before, after = (image.reshape(2, -1) @ unseen.T for image in (x, corrected))
    torch.testing.assert_close(after, before)
    nowhere = torch.zeros_like(operator.singular_values, dtype=torch.bool)
    assert not operator.correction(x, operator.Vt(other), where=nowhere).any()


@every_task
def test_posterior_mean_equals_the_dense_ridge_solution(params):
    operator, variance, sigma = make(params), 0.3, 0.2
    A, x_0, y = dense(operator), draw((2, *SHAPE), 1), draw((2, *operator.out_shape), 2)
    left = A.T @ A / sigma**2 + torch.eye(A.shape[1], dtype=torch.float64) / variance
    right = y.reshape(2, -1) @ A / sigma**2 + x_0.reshape(2, -1) / variance
    expected = torch.linalg.solve(left, right.T).T.reshape(x_0.shape)
    mean = operator.posterior_mean(x_0, operator.Ut(y), sigma, variance)
    torch.testing.assert_close(mean, expected)


@every_task
@pytest.mark.parametrize("rotated", [False, True])
def test_frequency_variance_is_the_diagonal_of_the_covariance(params, rotated):
    """Of images whose DCT coefficients are independent, along each singular direction."""
    operator = make(params)
    operator = operator.in_frequencies() if rotated else operator
    _, height, width = SHAPE
    power = draw((height, width), 3).square()
    basis = torch.kron(dct_matrix(height), dct_matrix(width))
    covariance = torch.block_diag(*[basis.T @ torch.diag(power.flatten()) @ basis] * SHAPE[0])
    count = operator.singular_values.numel()
    one_each = torch.eye(count, dtype=torch.float64).reshape(-1, *operator.singular_values.shape)
    V = operator.V(one_each).reshape(count, -1)
    expected = (V @ covariance @ V.T).diagonal().reshape(operator.singular_values.shape)
    found = operator.frequency_variance(power).expand(operator.singular_values.shape)
    torch.testing.assert_close(found, expected)


@every_task
def test_in_frequencies_is_the_same_operator(params):
    operator = make(params)
    torch.testing.assert_close(dense(operator.in_frequencies()), dense(operator))
    assert operator.in_frequencies().name == operator.name


@every_task
def test_sees_all_is_full_rank(params):
    operator = make(params)
    rank = np.linalg.matrix_rank(dense(operator).numpy(), tol=1e-6)
    assert operator.sees_all == (rank == math.prod(SHAPE))


@pytest.mark.parametrize(
    ("degradation", "expected"),
    [
        ({"name": "denoise"}, ""),
        ({"name": "super_resolution", "scale_factor": 8}, "x8"),
        ({"name": "super_resolution"}, "x4"),
        ({"name": "deblur"}, "gaussian"),
        ({"name": "deblur", "type": "uniform"}, "uniform"),
        ({"name": "color"}, ""),
    ],
)
def test_variants_tell_results_apart(degradation, expected):
    assert variant(degradation) == expected


def test_restored_size():
    assert restored_size((64, 50), "super_resolution", scale_factor=2) == (128, 100)
    assert restored_size((64, 50), "deblur", type="uniform") == (64, 50)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_parameter_is_explained_and_has_a_valid_default(name):
    operator = OPERATORS[name]
    assert operator.name == name
    complete = operator.check({})
    assert list(complete) == list(operator.parameters)
    for key, parameter in operator.parameters.items():
        assert parameter.help
        if parameter.default is not None:
            assert parameter.check(parameter.default, key) == parameter.default


class Mirror(SeparableOperator):
    """A toy: columns reversed and dimmed."""

    name = "mirror"
    parameters = {
        **SeparableOperator.parameters,
        "dimming": Parameter(0.5, "of all pixels", low=0, high=1),
    }

    @classmethod
    def factors_of(cls, in_shape, **parameters):
        channels, height, width = in_shape
        matrix = parameters["dimming"] * torch.eye(width, dtype=torch.float64).flip(0)
        threshold = parameters["singular_value_threshold"]
        cols = matrix_factor(matrix, threshold)
        return identity_factor(channels), identity_factor(height), cols

    @classmethod
    def variant(cls, parameters):
        return f"dim{parameters['dimming']:g}"


class TestANewOperator:
    """One class and one row are all that it takes."""

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        monkeypatch.setitem(OPERATORS, Mirror.name, Mirror)

    def test_is_built_by_its_name(self):
        x = draw((1, *SHAPE), 1)
        operator = get_operator("mirror", SHAPE, dtype=torch.float64, dimming=0.25)
        torch.testing.assert_close(operator.forward(x), 0.25 * x.flip(3))

    def test_has_its_parameters_checked(self):
        with pytest.raises(UserError, match=r"measurement\.operator\.dimming: .* \[0, 1\]"):
            get_operator("mirror", SHAPE, dimming=2)
        with pytest.raises(UserError, match="unknown key 'shine'"):
            get_operator("mirror", SHAPE, shine=2)

    def test_has_its_part_in_the_results_path(self):
        assert variant({"name": "mirror", "dimming": 0.25}) == "dim0.25"
        assert restored_size((5, 7), "mirror") == (5, 7)

    def test_is_named_where_a_name_is_wrong(self):
        with pytest.raises(UserError, match="mirror"):
            get_operator("miror", SHAPE)
