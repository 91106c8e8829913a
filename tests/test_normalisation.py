"""Group normalisation: one result in every memory format, and its own backward pass."""

import pytest
import torch

from guided_diffusion.normalisation import GroupNorm
from tests.conftest import rnd


def reference(x, weight, bias, scale, shift, eps=1e-5):
    """Wu & He 2018, equation 1, with 32 groups, then (1 + scale) y + shift."""
    groups = x.reshape(len(x), 32, -1)
    mean = groups.mean(2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(2, keepdim=True)
    normal = ((groups - mean) / (variance + eps) ** 0.5).reshape(x.shape)
    y = normal * weight.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
    return y if scale is None else (1 + scale) * y + shift


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("size", [(12, 20), (5, 7), (1, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(modulated, size, dtype, tolerance, memory_format):
    norm = GroupNorm(64)
    with torch.no_grad():
        norm.weight.copy_(rnd((64,), 1))
        norm.bias.copy_(rnd((64,), 2))
    x = (rnd((3, 64, *size), 3) + 0.5).to(dtype).contiguous(memory_format=memory_format)
    modulation = [rnd((3, 64, 1, 1), s).to(dtype) for s in (4, 5)] if modulated else []
    direction = rnd(x.shape, 6).to(dtype)

    def run(function, dtype):
        leaves = [v.detach().to(dtype).requires_grad_() for v in (x, *modulation)]
        y = function(*leaves)
        inputs = [*leaves, norm.weight, norm.bias]
        return [y, *torch.autograd.grad((y * direction.to(dtype)).sum(), inputs)]

    found = run(norm, dtype)
    norm.double()
    none = [] if modulated else [None, None]
    known = run(lambda x, *m: reference(x, norm.weight, norm.bias, *m, *none), torch.float64)
    for a, b in zip(found, known, strict=True):
        assert (a.double() - b).norm() < tolerance * b.norm()
    if memory_format is torch.channels_last and min(size) > 1:
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            other = norm.float()(x, *modulation)
        assert (found[0] - other).norm() < tolerance * other.norm()
