"""Small operators, statistics and schedules for the tests of the few-step method."""

import math

import numpy as np
import torch

from guided_diffusion.operators import get_operator
from guided_diffusion.statistics import PriorStatistics

SIZE = 16
HEADS = PriorStatistics(  # axial slices of heads, whatever prior ships
    -0.8,
    (1, 3, 6, 12, 24, 48, 96, 192, 400),
    (425, 147, 20, 4.2, 1.0, 0.187, 0.021, 0.0009, 0.00009),
    "LGG MRI Segmentation",
)
WHITE = PriorStatistics(HEADS.mean_intensity, (1,), (0.25,), source="these tests")
OPERATORS = {
    "denoise": {"name": "denoise"},
    "sr": {"name": "super_resolution", "scale_factor": 4},
    "means": {"name": "super_resolution", "scale_factor": 4, "type": "standard"},
    "gauss": {"name": "deblur", "type": "gaussian", "kernel_size": 9, "intensity": 1.0},
    "uniform": {"name": "deblur", "type": "uniform", "kernel_size": 9},
    "mirror": {"name": "deblur", "type": "gaussian", "intensity": 1.0, "boundary": "reflect"},
    "mirrorbox": {"name": "deblur", "type": "uniform", "kernel_size": 9, "boundary": "reflect"},
    "color": {"name": "color"},
}
SHAPES = {"color": (3, SIZE, SIZE)}
CONFIG = {
    "sampler": "ddpm",
    "steps": 1000,
    "noise_schedule": "linear",
    "model_mean_type": "start_x",
    "model_var_type": "fixed_small",
    "dynamic_threshold": False,
    "clip_denoised": False,
    "rescale_timesteps": False,
}


def matrix_of(operator):
    """A as a dense matrix, column by column."""
    eye = torch.eye(math.prod(operator.in_shape), dtype=torch.float64)
    images = eye.reshape(-1, *operator.in_shape)
    return operator.forward(images).reshape(len(eye), -1).mT


def operator_of(name):
    in_shape = SHAPES.get(name, (1, SIZE, SIZE))
    return get_operator(in_shape=in_shape, dtype=torch.float64, **OPERATORS[name])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dct_2d(size):
    """(size², size²): every row a two-dimensional cosine of unit norm."""
    k, n = np.arange(size)[:, None], np.arange(size)
    rows = np.cos(math.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return torch.from_numpy(np.kron(rows, rows))
