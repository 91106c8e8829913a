"""Make saved_results/accelerated_mri.png: ``python tests/benchmarks/kspace_figure.py``.

A sample slice, eight coils, R = 4 and 8: zero-filled, total variation, the few-step method, the
standard deviation of posterior samples, and the truth. The weight of total variation is the best on
this very slice. Prints PSNR and SSIM of each, and the share
of pixels whose truth lies within the samples' 90 % interval.
"""

import os
import sys

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.dataloader import read_image
from guided_diffusion import Measurement, NoiseConfig, OperatorConfig, load_prior, restore
from tests.benchmarks.kspace import CLASSICAL, Case, measure
from util.errors import status_of
from util.files import replacing
from util.metrics import calibration, image_metrics

SLICE = "data/mri_256_orig/colin27_t1_z092.png"
SAMPLES = "configs/diffusion_config_samples.yaml"
COUNT = 8  # posterior samples
TITLES = ("zero-filled", "total variation", "spectral, 10 evaluations", "posterior std", "truth")
PATH = "saved_results/accelerated_mri.png"


def spread(case: Case, name: str, truth: torch.Tensor, prior):
    """(K, 1, H, W) posterior samples."""
    measurement = Measurement(
        OperatorConfig("mri", case.parameters_of(name)),
        NoiseConfig("gaussian", case.sigma),
        simulated=True,
    )
    method = "spectral_sample"
    found = restore(
        truth[None], measurement, prior, method, SAMPLES, names=[name], num_samples=COUNT
    )
    return found.samples[0]


def best(case: Case, method: str, name: str, truth: torch.Tensor, prior):
    """The image of the weight with the best PSNR, and its metrics."""
    weights = CLASSICAL[method][1] if method in CLASSICAL else (0.0,)
    images = [measure(case, method, weight, name, truth, prior)[0] for weight in weights]
    found = [image_metrics(x.numpy(), truth.numpy()) for x in images]
    i = max(range(len(images)), key=lambda i: found[i]["psnr"])
    return images[i], found[i]


def main() -> None:
    prior, truth = load_prior(), torch.from_numpy(read_image(SLICE))
    name = os.path.splitext(os.path.basename(SLICE))[0]
    figure = Figure(figsize=(12.5, 5.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(TITLES))
    for row, R in zip(axes, (4, 8), strict=True):
        case = Case(8, "equispaced_fraction", R, 0.01)
        images, captions = [], []
        for method in ("zero_filled", "tv", "spectral_10"):
            x, found = best(case, method, name, truth, prior)
            images.append(x[0].numpy())
            captions.append(f"{found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}")
        samples = spread(case, name, truth, prior)
        inside = calibration(samples, truth.numpy())["in_90"]
        images += [samples.std(axis=0, ddof=1)[0] / 2, truth[0].numpy()]
        captions += [f"up to {np.quantile(images[3], 0.999):.3f}, white is 1", ""]
        print(f"R = {R}: {captions[:3]}, 90 % intervals hold {inside:.1%}", flush=True)
        for i, (axis, image) in enumerate(zip(row, images, strict=True)):
            low, high = (-1, 1) if i != 3 else (0, float(np.quantile(image, 0.999)))
            axis.imshow(image, cmap="gray" if i != 3 else "inferno", vmin=low, vmax=high)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(captions[i], fontsize=9)
            axis.set_title(TITLES[i] if R == 4 else "", fontsize=10)
        row[0].set_ylabel(f"8 coils, R = {R}", fontsize=10)
    with replacing(PATH) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    sys.exit(status_of(main))
