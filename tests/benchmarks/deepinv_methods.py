"""deepinv's DDRM, DiffPIR and DPS on this program's measurements and network.

deepinv (https://deepinv.github.io, ``pip install deepinv``) is not among the requirements. It works
on images u = (x+1)/2 in [0, 1], where the measurement is (y + A 1)/2 = A u + σ/2 n (A 1 is no
constant near the edge of a blur). Its methods keep their default parameters.
"""

import numpy as np
import torch
from torch.nn.functional import pad

from guided_diffusion.denoiser import deepinv_denoiser, import_deepinv
from guided_diffusion.measurements import Factor, SeparableOperator
from util.random import image_generator


def full_operator(operator):
    """The same A = U Σ Vᵀ with a square V: deepinv takes V Vᵀ for the identity.

    Every axis' V is completed to a basis; the singular values of what is added are 0, and so are
    its columns of U. That of several coils is square already.
    """
    if not isinstance(operator, SeparableOperator):
        return operator
    factors = []
    for f in operator.factors:
        if f.V is not None:
            n, k = f.V.shape
            rest = torch.linalg.qr(f.V.double(), mode="complete").Q[:, k:].to(f.V)
            f = Factor(pad(f.U, (0, n - k)), pad(f.s, (0, n - k)), torch.cat([f.V, rest], dim=1))
        factors.append(f)
    s = operator.singular_values
    return SeparableOperator(*factors, device=s.device, dtype=s.dtype)


def physics_of(operator, sigma):
    """y = A x + σ n as deepinv has it, for images in [0, 1]."""
    deepinv, full = import_deepinv(), full_operator(operator)
    return deepinv.physics.DecomposablePhysics(
        U=full.U,
        U_adjoint=full.Ut,
        V=full.V,
        V_adjoint=full.Vt,
        mask=full.singular_values[None],
        img_size=tuple(operator.in_shape),
        noise_model=deepinv.physics.GaussianNoise(sigma / 2),
        device=full.singular_values.device,
    )


def deepinv_ddrm(denoiser, physics, steps):
    sigmas = np.linspace(1, 0, steps)  # its default, for this many steps
    return import_deepinv().sampling.DDRM(denoiser, sigmas=sigmas)


def deepinv_diffpir(denoiser, physics, steps):
    deepinv = import_deepinv()
    return deepinv.sampling.DiffPIR(
        denoiser,
        deepinv.optim.data_fidelity.L2(),
        sigma=physics.noise_model.sigma.item(),
        max_iter=steps,
        device=physics.mask.device,
    )


def deepinv_dps(denoiser, physics, steps):
    times = steps + 1  # it evaluates the network between them
    return import_deepinv().sampling.DPS(denoiser, num_steps=times, device=physics.mask.device)


DEEPINV = {
    "deepinv_ddrm": deepinv_ddrm,
    "deepinv_diffpir": deepinv_diffpir,
    "deepinv_dps": deepinv_dps,
}


def restore(name, operator, y, sigma, image, prior, steps, seed):
    """x̂ (1, 1, H, W) in [-1, 1], by one of `DEEPINV`.

    Args:
        y, sigma: the measurement and its noise, in units of the [-1, 1] image.
        image: `comparison.Slice`.
        prior: `guided_diffusion.prior.Prior`, on the CPU.
        steps: evaluations of the network.
    """
    physics = physics_of(operator, sigma)
    reconstruct = DEEPINV[name](deepinv_denoiser(prior), physics, steps)
    y = (y + operator.forward(torch.ones_like(image.truth, device=prior.device))) / 2
    torch.manual_seed(image_generator(image.name, 0, seed).initial_seed())
    return (2 * reconstruct(y, physics) - 1).clamp(-1, 1).float().cpu()
