"""DDRM, DDNM, DiffPIR, DPS and ΠGDM against runs of their published programs.

fixtures/README.md says what was run and how. A run is named
FAMILY/NETWORK/OPERATOR/σ/SPACING/STEPS.
"""

import math
import os

import numpy as np
import pytest
import torch

from guided_diffusion.condition_methods import METHODS
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.measurements import SeparableOperator, identity_factor, matrix_factor
from guided_diffusion.schedules import space_timesteps
from tests.conftest import HERE, rnd

SHAPE = (1, 1, 16, 16)
TOLERANCE = 1e-4  # relative error, in the L2 norm over the pixels kept
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
# family → (method, parameters, x̂_0 clipped, learned variance, whether it is told σ)
FAMILIES = {
    "ddrm": ("ddrm", {"eta": 0.85, "eta_b": 1.0}, False, False, True),
    "ddrmthr": ("ddrm", {"eta": 0.85, "eta_b": 1.0}, False, False, True),
    "ddnm": ("ddnm", {"eta": 0.85}, False, False, True),
    "ddnmthr": ("ddnm", {"eta": 0.85}, False, False, True),
    "dps": ("dps", {"scale": 0.3}, True, True, True),
    "pgdm": ("pigdm", {"eta": 1.0}, False, False, False),
    "ibpigdm": ("pigdm", {"eta": 0.0}, False, False, True),
    "diffpir": ("diffpir", {"lambda_": 7.0, "zeta": 0.3}, True, True, True),
}
with np.load(os.path.join(HERE, "fixtures", "samplers.npz")) as file:
    PUBLISHED = dict(file)
FIRST = dict(zip(PUBLISHED["first_keys"].tolist(), PUBLISHED["first"], strict=True))
LAST = dict(zip(PUBLISHED["last_keys"].tolist(), PUBLISHED["last"], strict=True))
STATES = dict(zip(PUBLISHED["states_keys"].tolist(), PUBLISHED["states"], strict=True))
GROUPS = sorted({tuple(key.split("/")[:4]) for key in LAST})


def gauss(x, t):
    """The optimal predictor of noise for pixels that are N(0.1, 0.3²)."""
    a = float(ALPHA_BAR[int(t[0])])
    return math.sqrt(1 - a) * (x - math.sqrt(a) * 0.1) / (a * 0.09 + 1 - a)


def tanh(x, t):
    return 0.9 * torch.tanh(x) + 0.05 * torch.roll(x, 1, -1)


def operator_of(name):
    if name == "id":
        return SeparableOperator(*(identity_factor(n) for n in SHAPE[1:]))
    factor = matrix_factor(torch.from_numpy(PUBLISHED[f"M/{name}"]), 3e-2)
    return SeparableOperator(identity_factor(1), factor, factor)


def states_of(key):
    """Every state of this program's run, from the one after the first step on."""
    family, network, operator, sigma, spacing, steps = key.split("/")
    name, params, clip, learned, told = FAMILIES[family]
    predict = {"gauss": gauss, "tanh": tanh}[network]

    def model(x, t):
        eps = predict(x, t)
        return torch.cat([eps, 0.3 * torch.tanh(x)], 1) if learned else eps

    timesteps = PUBLISHED[f"timesteps/{spacing}/{steps}"]
    a = ALPHA_BAR[timesteps]
    diffusion = GaussianDiffusion(
        1 - a / np.append(1.0, a[:-1]),
        timesteps.tolist(),
        clip_denoised=clip,
        model_var_type="learned_range" if learned else "fixed_small",
    )
    y = torch.from_numpy(PUBLISHED[f"y/{operator}/{sigma}"])
    method = METHODS[name](operator_of(operator), y, float(sigma) if told else 0.0, **params)
    x = rnd(SHAPE, 500)
    if name == "ddrm":  # mixes y into its first state
        x = torch.from_numpy(FIRST["/".join(key.split("/")[2:])]).reshape(SHAPE)
    with torch.inference_mode():
        for k, t in enumerate(reversed(range(len(timesteps)))):
            noise = rnd(SHAPE, 1000 + k)
            x, _ = method.step(diffusion, model, x, t, lambda _, noise=noise: noise)
            yield x


def error(x, expected):
    found = x.flatten()[torch.from_numpy(PUBLISHED["pixels"]).long()].double().numpy()
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def comparable(key, states):
    """The states that the published program computes, too.

    DiffPIR's does nothing at its last evaluation; DDRM's has no case for σ = 0 at the last step.
    """
    family, sigma = key.split("/")[0], key.split("/")[3]
    return states[:-1] if family == "diffpir" or (family, sigma) == ("ddrm", "0.0") else states


@pytest.mark.parametrize("group", GROUPS, ids="/".join)
def test_whole_runs(group):
    for key in LAST:
        if tuple(key.split("/")[:4]) == group:
            assert error(comparable(key, list(states_of(key)))[-1], LAST[key]) < TOLERANCE


@pytest.mark.parametrize("key", STATES)
def test_every_state_of_a_run(key):
    states = comparable(key, list(states_of(key)))
    assert len(states) >= 9
    for ours, published in zip(states, STATES[key][1:], strict=False):
        assert error(ours, published) < TOLERANCE


@pytest.mark.parametrize("operator", ["id", "sr4"])
@pytest.mark.parametrize("family", ["ddrm", "ddnm"])
def test_a_noiseless_measurement_is_met_at_the_last_step(family, operator):
    *_, x = states_of(f"{family}/tanh/{operator}/0.0/guided/10")
    y = torch.from_numpy(PUBLISHED[f"y/{operator}/0.0"])
    torch.testing.assert_close(operator_of(operator).forward(x), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [10, 20])
def test_quad_respacing(steps):
    assert space_timesteps(1000, f"quad{steps}") == PUBLISHED[f"timesteps/quad/{steps}"].tolist()


def test_every_published_setting_is_covered():
    """What the fixture holds: families, operators, noise levels, spacings and networks."""
    parts = [set(part) for part in zip(*(key.split("/") for key in LAST), strict=True)]
    families, networks, operators, sigmas, spacings, steps = parts
    assert families == set(FAMILIES)
    assert networks == {"gauss", "tanh"}
    assert operators == {"id", "sr4", "blur", "blurnull", "circ"}
    assert sigmas == {"0.0", "0.05", "0.2"}
    assert spacings == {"pub", "guided", "quad", "uniform"}
    assert steps == {"10", "20"}
