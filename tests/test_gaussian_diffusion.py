"""Schedules, respacing and the reverse process."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.schedules import space_timesteps
from tests.conftest import LINEAR, rnd
from util.errors import UserError
from util.random import ImageRandom, image_generator

PRIOR_ALONE = GaussianDiffusion.p_sample


def sampler(**changes):
    return create_sampler(**{**LINEAR, "timestep_respacing": "", **changes})


@pytest.mark.parametrize(
    ("name", "steps", "respacing"),
    [("1000", 1000, 1000), ("100", 1000, 100), ("seed", 4444, 1111), ("ddim50", 1000, "ddim50")],
)
def test_schedules_equal_published(golden, name, steps, respacing):
    diffusion = sampler(steps=steps, timestep_respacing=respacing)
    assert diffusion.timestep_map == golden[f"sched_{name}/map"].tolist()
    assert diffusion.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(diffusion.betas, golden[f"sched_{name}/betas"], rtol=1e-10)
    np.testing.assert_allclose(diffusion.alphas_cumprod, golden[f"sched_{name}/abar"], rtol=1e-10)


@pytest.mark.parametrize("t", [0, 10, 60, 99])
def test_reverse_step_equals_published(assert_golden, t):
    output = rnd((1, 6, 256, 256), 32) * 0.5
    out = sampler(timestep_respacing=100).p_mean_variance(
        lambda x, timesteps: output, rnd((1, 3, 256, 256), 31), torch.tensor([t])
    )
    assert_golden(f"ddpm_{t}/mean", out["mean"])
    assert_golden(f"ddpm_{t}/logvar", out["log_variance"])
    assert_golden(f"ddpm_{t}/x0", out["pred_xstart"])
    torch.testing.assert_close(out["variance"], out["log_variance"].exp())


def test_cosine_schedule_is_that_of_the_paper():
    diffusion = sampler(noise_schedule="cosine", steps=50)

    def f(t):
        return math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 40):
        assert diffusion.alphas_cumprod[t] == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert diffusion.betas.max() == pytest.approx(0.999)


def test_sections_are_respaced_one_by_one():
    kept = space_timesteps(300, "10,15,20")
    counts = [sum(a <= t < a + 100 for t in kept) for a in (0, 100, 200)]
    assert counts == [10, 15, 20]
    assert kept == space_timesteps(300, [10, 15, 20])
    assert kept[0] == 0 and kept[9] == 99 and kept[10] == 100 and kept[-1] == 299
    assert space_timesteps(7, "") == list(range(7))


@pytest.mark.parametrize(
    "respacing",
    [1001, "600,600", "ddim999", "ddim", "quad1001", "quad", "a,b", 0, -3, 1.5, True],
)
def test_impossible_respacing_is_refused(respacing):
    with pytest.raises(UserError, match="timestep_respacing"):
        space_timesteps(1000, respacing)


@pytest.mark.parametrize(
    ("steps", "respacing", "expected"),
    [
        (7, 100, list(range(7))),
        (7, "quad100", list(range(7))),
        (7, "2,9", [0, 3, 4, 5, 6]),
        (1, "2,9", [0]),
        (7, "ddim100", list(range(7))),
        (7, "ddim5", [0, 2, 4, 6]),  # strides make 7 or 4 of them
        (1, "ddim1", [0]),
        (300, "10,15,20", space_timesteps(300, "10,15,20")),
    ],
)
def test_a_count_is_of_the_steps_there_are_where_fewer_do(steps, respacing, expected):
    kept = space_timesteps(steps, respacing, at_most=True)
    assert set(kept) <= set(expected) if respacing == "quad100" else kept == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampler", "euler"),
        ("noise_schedule", "sigmoid"),
        ("model_mean_type", "v"),
        ("model_var_type", "big"),
        ("steps", 0),
        ("eta", 2.0),
    ],
)
def test_unknown_names_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        sampler(**{key: value})


def test_mean_types_agree_on_the_same_prediction():
    """A network that knows x_0 must give one mean, whatever it is asked to predict."""
    x_0, noise = rnd((2, 1, 4, 4), 1).clamp(-1, 1), rnd((2, 1, 4, 4), 2)
    t = torch.tensor([7, 30])
    reference = sampler(timestep_respacing=50)
    x_t = reference.q_sample(x_0, t, noise)
    a = torch.from_numpy(reference.alphas_cumprod)[t].reshape(2, 1, 1, 1)
    torch.testing.assert_close(x_t, (a.sqrt() * x_0 + (1 - a).sqrt() * noise).float())
    mean = reference.q_posterior_mean(x_0, x_t, t)
    for mean_type, target in (("epsilon", noise), ("start_x", x_0), ("previous_x", mean)):
        diffusion = sampler(
            timestep_respacing=50, model_mean_type=mean_type, model_var_type="fixed_small"
        )
        out = diffusion.p_mean_variance(lambda x, s, target=target: target, x_t, t)
        torch.testing.assert_close(out["pred_xstart"], x_0, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(out["mean"], mean, rtol=1e-3, atol=1e-3)


def test_variance_types():
    x, t, values = rnd((1, 1, 2, 2), 1), torch.tensor([20]), rnd((1, 1, 2, 2), 3)

    def log_variance(kind):
        diffusion = sampler(timestep_respacing=50, model_var_type=kind)
        out = diffusion.p_mean_variance(lambda *_: torch.cat([x, values], 1), x, t)
        return diffusion, out["log_variance"]

    diffusion, small = log_variance("fixed_small")
    a, previous = diffusion.alphas_cumprod[20], diffusion.alphas_cumprod[19]
    beta = 1 - a / previous
    low = math.log(beta * (1 - previous) / (1 - a))
    torch.testing.assert_close(small, torch.full_like(small, low))
    large = log_variance("fixed_large")[1]
    torch.testing.assert_close(large, torch.full_like(large, math.log(beta)))
    torch.testing.assert_close(log_variance("learned")[1], values)
    mixed = log_variance("learned_range")[1]
    share = (values + 1) / 2
    torch.testing.assert_close(mixed, share * math.log(beta) + (1 - share) * low)


def test_learned_variance_needs_a_model_that_has_it():
    with pytest.raises(UserError, match="learn_sigma"):
        sampler().p_mean_variance(lambda x, t: x, rnd((1, 1, 2, 2), 1), torch.tensor([5]))


def test_clipping_and_dynamic_thresholding_work_per_image():
    """One bright image must not change how its neighbour in the batch is treated."""
    x_0 = torch.stack([torch.full((1, 8, 8), 0.5), torch.linspace(-3, 3, 64).reshape(1, 8, 8)])
    t = torch.tensor([10, 10])

    def pred(**changes):
        diffusion = sampler(model_mean_type="start_x", model_var_type="fixed_small", **changes)
        return diffusion.p_mean_variance(lambda *_: x_0, x_0, t)["pred_xstart"]

    assert pred(clip_denoised=False)[1].max() == 3
    assert pred()[1].max() == 1
    dynamic = pred(dynamic_threshold=True, clip_denoised=False)
    torch.testing.assert_close(dynamic[0], x_0[0])
    bound = np.quantile(np.abs(x_0[1].numpy()), 0.995)
    expected = np.clip(x_0[1].numpy(), -bound, bound) / bound
    np.testing.assert_allclose(dynamic[1].numpy(), expected, rtol=1e-5)


def test_dynamic_thresholding_of_a_volume_is_that_of_its_slices():
    x_0 = rnd((2, 3, 8, 8), 1) * torch.tensor([0.1, 1, 3]).reshape(1, 3, 1, 1)
    of_volumes = sampler(dynamic_threshold=True, clip_denoised=False, slices=True)
    of_images = sampler(dynamic_threshold=True, clip_denoised=False)
    expected = of_images.bound(x_0.reshape(6, 1, 8, 8)).reshape(x_0.shape)
    assert torch.equal(of_volumes.bound(x_0), expected)
    assert not torch.equal(of_images.bound(x_0), expected)  # of pictures all channels share one


def test_the_network_is_told_the_original_timesteps():
    t = torch.tensor([0, 3])
    plain = sampler(steps=400, timestep_respacing=4)
    assert plain.model_timesteps(t).tolist() == [0, 399]
    rescaled = sampler(steps=400, timestep_respacing=4, rescale_timesteps=True)
    assert rescaled.model_timesteps(t).tolist() == pytest.approx([0, 997.5])


MU, SIGMA = 0.4, 0.3


def gaussian_prior(diffusion):
    """The exact noise predictor for pixels that are independently N(MU, SIGMA²)."""
    table = dict(zip(diffusion.timestep_map, diffusion.alphas_cumprod, strict=True))

    def model(x, timesteps):
        a = torch.tensor([table[int(t)] for t in timesteps]).reshape(-1, 1, 1, 1).float()
        return (1 - a).sqrt() * (x - a.sqrt() * MU) / (a * SIGMA**2 + 1 - a)

    return model


@pytest.mark.parametrize("settings", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_samplers_draw_from_a_known_prior(settings):
    name, eta = settings
    diffusion = sampler(
        sampler=name,
        eta=eta,
        timestep_respacing=250,
        model_var_type="fixed_small",
        clip_denoised=False,
    )
    random = ImageRandom([image_generator("x", i, 0) for i in range(4)])
    x_T = random.randn_like(torch.zeros(4, 1, 32, 32))
    x_0 = diffusion.p_sample_loop(gaussian_prior(diffusion), x_T, PRIOR_ALONE, random.randn_like)
    assert x_0.mean().item() == pytest.approx(MU, abs=0.02)
    assert x_0.std().item() == pytest.approx(SIGMA, abs=0.02)


def test_ddim_without_noise_is_deterministic_and_draws_none():
    diffusion = sampler(sampler="ddim", timestep_respacing=10, model_var_type="fixed_small")

    def no_noise(x):
        raise AssertionError("drew noise")

    x_T = rnd((1, 1, 8, 8), 1)
    diffusion.p_sample_loop(gaussian_prior(diffusion), x_T, PRIOR_ALONE, no_noise)


def test_a_batch_is_its_images_and_no_graph_is_built():
    diffusion = sampler(timestep_respacing=8, model_var_type="fixed_small")
    weight = torch.ones(1, requires_grad=True)
    prior, seen = gaussian_prior(diffusion), []

    def model(x, t):
        return weight * prior(x, t)

    def run(names):
        random = ImageRandom([image_generator(n, 0, 7) for n in names])
        x_T = random.randn_like(torch.zeros(len(names), 1, 8, 8))
        return diffusion.p_sample_loop(
            model, x_T, PRIOR_ALONE, random.randn_like, lambda *state: seen.append(state)
        )

    together = run(["a", "b", "c"])
    alone = torch.cat([run([n]) for n in "abc"])
    torch.testing.assert_close(together, alone)
    assert not together.requires_grad
    assert [s[0] for s in seen[:8]] == list(range(7, -1, -1))
