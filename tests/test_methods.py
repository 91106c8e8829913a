"""The registry of methods: names, traits, parameters, and what it takes to add one."""

import inspect
import os

import pytest
import torch

from guided_diffusion.batches import begin
from guided_diffusion.config import Schedule
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods import (
    METHODS,
    VANILLA,
    check_conditioning,
    get_conditioning_method,
    method_names,
)
from guided_diffusion.methods.base import Method
from guided_diffusion.operators import get_operator
from tests.conftest import LINEAR, REPOSITORY, rnd
from util.errors import UserError
from util.parameters import Parameter


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.name == name and method.label and method.__doc__
    assert list(inspect.signature(method.step).parameters) == [
        *("self", "diffusion", "model", "x", "t", "randn_like")
    ]
    for key, parameter in method.parameters.items():
        assert parameter.help
        assert parameter.check(parameter.default, key) == parameter.default
    if method.schedule:
        assert os.path.exists(os.path.join(REPOSITORY, "configs", method.schedule))


def test_vanilla_is_no_method_and_may_be_asked_for():
    assert VANILLA not in METHODS and VANILLA in method_names()
    assert check_conditioning(VANILLA, {}) == {"epsilon_scale": 1.0}  # DDPM
    with pytest.raises(UserError, match="vanilla takes epsilon_scale"):
        check_conditioning(VANILLA, {"scale": 1.0})


@pytest.mark.parametrize(
    ("operator", "lambda_", "zeta"),
    [("super_resolution", 15.0, 0.25), ("deblur", 7.0, 0.3), ("denoise", 7.0, 0.3)],
)
def test_diffpir_has_the_published_setting_of_each_task(operator, lambda_, zeta):
    expected = {"lambda_": lambda_, "zeta": zeta}
    assert check_conditioning("diffpir", {}, operator) == expected
    built = get_operator(operator, (1, 8, 8))
    y = torch.zeros(1, *built.out_shape)
    method = get_conditioning_method("diffpir", built, y, 0.1)
    assert (method.lambda_, method.zeta) == (lambda_, zeta)
    method = get_conditioning_method("diffpir", built, y, 0.1, lambda_=3.0)
    assert (method.lambda_, method.zeta) == (3.0, zeta)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("ddrm", {"eta": 1.5}, r"conditioning.params.eta: expected a number in \[0, 1\]"),
        ("spectral", {"kappa": 0}, "kappa: expected a positive number"),
        ("dmps", {"scale": True}, "scale: expected a number, found True"),
        ("dps", {"step": 1.0}, r"unknown key 'step' \(dps takes scale\)"),
    ],
)
def test_values_out_of_range_are_refused(name, params, says):
    with pytest.raises(UserError, match=says):
        check_conditioning(name, params)


def test_the_noise_of_spectral_has_a_kappa_of_its_own_but_where_one_is_better():
    found = {task: check_conditioning("spectral", {}, task) for task in ("deblur", "mri")}
    assert found["deblur"]["kappa_noise"] < 1 < found["deblur"]["kappa"]
    assert found["mri"]["kappa_noise"] == found["mri"]["kappa"]


def test_a_number_that_yaml_reads_as_text_is_a_number():
    assert check_conditioning("dmps", {"scale": "1e-1"}) == {"scale": 0.1}


class Nudge(Method):
    """A toy: the prior's step, then a share of the way to the measured coefficients."""

    name = "nudge"
    label = "a toy"
    parameters = {"share": Parameter(0.5, "of the way", low=0, high=1, defaults_for={"color": 1.0})}
    unclipped_from = 10
    share: float

    def step(self, diffusion, model, x, t, randn_like):
        x, x_0 = diffusion.p_sample(model, x, t, randn_like)
        measured, _ = self.operator.inverted(self.reduced, self.sigma)
        return x + self.share * self.operator.correction(x, measured), x_0


class TestANewMethod:
    """One class and one row are all that it takes."""

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        monkeypatch.setitem(METHODS, Nudge.name, Nudge)

    def test_is_named_and_checked_like_the_others(self):
        assert Nudge.name in method_names()
        assert check_conditioning("nudge", {}) == {"share": 0.5}
        assert check_conditioning("nudge", {}, "color") == {"share": 1.0}
        with pytest.raises(UserError, match=r"params.share: expected a number in \[0, 1\]"):
            check_conditioning("nudge", {"share": 2})

    @pytest.mark.parametrize("start", ["", "auto"])
    def test_restores_with_the_traits_it_states(self, start):
        operator = get_operator("super_resolution", (1, 8, 8), scale_factor=2)
        y = operator.forward(rnd((2, 1, 8, 8), 1).clamp(-1, 1))
        schedule = {**LINEAR, "model_var_type": "fixed_small", "clip_denoised": "auto"}
        schedule |= {"timestep_respacing": "logsnr12", "start": start}
        params = {"share": 1.0}
        x_T = rnd((2, 1, 8, 8), 2)
        diffusion, x_T, step = begin(
            "nudge", params, Schedule(**schedule), (operator, y, 0.0), x_T
        )
        assert diffusion.clip_denoised is False
        x = diffusion.p_sample_loop(lambda x, t: 0.5 * x, x_T, step, torch.zeros_like)
        torch.testing.assert_close(operator.forward(x), y, atol=1e-4, rtol=0)

    def test_is_named_where_a_name_is_wrong(self):
        with pytest.raises(UserError, match="nudge"):
            check_conditioning("nugde", {})


def test_the_prior_alone_is_the_reverse_process():
    schedule = {**LINEAR, "model_var_type": "fixed_small", "timestep_respacing": 5, "start": ""}
    x_T = rnd((1, 1, 4, 4), 1)
    diffusion, start, step = begin(VANILLA, {}, Schedule(**schedule), None, x_T)
    assert start is x_T
    found = diffusion.p_sample_loop(lambda x, t: 0.1 * x, x_T, step, torch.zeros_like)
    expected, plain = x_T, create_sampler(**schedule)
    for t in reversed(range(5)):
        expected, _ = plain.p_sample(lambda x, t: 0.1 * x, expected, t, torch.zeros_like)
    torch.testing.assert_close(found, expected)
