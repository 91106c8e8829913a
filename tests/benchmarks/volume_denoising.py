"""Denoising of a magnitude volume by 3-D methods: ``python tests/benchmarks/volume_denoising.py``.

--slices of the sample volume about the --middle, --crop rows and columns of each, get Rice noise of
3, 5 and 9 % of the white level and are restored by dipy's two NL-means for Rice noise, by BM4D (as
it is, and with the bias of the magnitude taken from its result), and by this program: slice by
slice, and as a volume whose three planes the network sees. All are told the noise. PSNR, SSIM (in
the slices' plane) and HaarPSI are those of the head; seconds are those of one thread of the CPU.
Writes a row for each method and noise to saved_results/benchmarks/volume_denoising.csv, and
measures only what is missing there. On another part of the volume than the settings were chosen on,
with other noise: --middle 45 --seed 1; on another volume, without noise of its own: --volume FILE.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.masks import head_mask
from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.noise import get_noise, rician_to_gaussian
from guided_diffusion.prior import SHIPPED, Prior, load_prior
from guided_diffusion.restoration import FAST, restore
from guided_diffusion.volumes import AsVolume
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.thick_slices import load
from tests.benchmarks.volume_rows import OURS, Rows
from util.errors import ArgumentParser, status_of
from util.flags import positive
from util.metrics import image_metrics

Volume = NDArray[np.float32]  # (D, H, W), black at -1
PERCENT = (3, 5, 9)  # σ, of the white level
COLUMNS = ("part", "noise_percent", "method", "psnr", "ssim", "haarpsi", "seconds", "prior")
KEY = COLUMNS[:3]
PATH = os.path.join(FOLDER, "volume_denoising.csv")
CUBES = AsVolume(chunk=1, in_turn=True)  # how main.py restores a volume of cubic voxels


def nl_means(M: Volume, sigma: float, kind: str) -> Volume:
    """The Rice form, with dipy's default patches: blockwise (Coupé et al. 2008), or classic."""
    from dipy.denoise.nlmeans import nlmeans

    signal = (M + 1).astype(np.float64)
    return nlmeans(signal, sigma=sigma, rician=True, num_threads=1, method=kind) - 1


def bm4d(M: Volume, sigma: float) -> Volume:
    """Maggioni et al. 2013, told that the noise is Gaussian."""
    from bm4d import bm4d as denoise

    return 2 * denoise((M + 1).astype(np.float64) / 2, sigma / 2) - 1


def unbiased(x: Volume, sigma: float) -> Volume:
    """x, the mean of a magnitude, without what noise adds to it: E[M]² ≈ A² + σ²."""
    return np.sqrt(np.maximum((x + 1) ** 2 - sigma**2, 0)) - 1


def gaussian(M: Volume, sigma: float) -> Volume:
    """M with Gaussian noise in place of Rice noise, by this program's own step."""
    return rician_to_gaussian(torch.from_numpy(M)[None], sigma)[0].numpy()


MEASURED, VARYING = (
    Measurement(OperatorConfig("denoise"), NoiseConfig("rician", sigma), False)
    for sigma in ("auto", "local")
)


def ours(prior: Prior, M: Volume, sigma: float | Volume, way: AsVolume) -> Volume:
    """By this program, told σ or a map of it."""
    given = isinstance(sigma, float)
    noise = NoiseConfig("rician", sigma if given else "auto")
    measurement = Measurement(OperatorConfig("denoise"), noise, False)
    known = None if given else torch.from_numpy(sigma)[None]
    return restore(
        M[None], measurement, prior, "spectral", FAST, names=["v"], sigma=known, volume=way
    ).mean[0]


def methods(
    prior: Prior, M: Volume, sigma: float, whole: AsVolume = CUBES
) -> dict[str, Callable[[], Volume]]:
    """What restores M, by its name in the table.

    Args:
        whole: how this program restores M as a volume.
    """
    kept: dict[str, Volume] = {}

    def block_matching() -> Volume:
        kept["bm4d"] = bm4d(M, sigma)
        return kept["bm4d"]

    def without_bias() -> Volume:
        return unbiased(kept["bm4d"] if kept else block_matching(), sigma)

    return {
        "noisy": lambda: M,
        "NL-means (dipy, blockwise)": lambda: nl_means(M, sigma, "blockwise"),
        "NL-means (dipy, classic)": lambda: nl_means(M, sigma, "classic"),
        "BM4D": block_matching,
        "BM4D, bias removed": without_bias,
        "BM4D of Gaussian noise": lambda: bm4d(gaussian(M, sigma), sigma),
        "ours, slices": lambda: ours(prior, M, sigma, replace(whole, in_turn=False)),
        "ours, volume": lambda: ours(prior, M, sigma, whole),
    }


def noisy(truth: Volume, percent: int, seed: int) -> Volume:
    """With Rice noise of so many percent of the white level, always the same for a seed."""
    random = Seeded(percent + 1000 * seed)
    return get_noise("rician", 2 * percent / 100)(torch.from_numpy(truth)[None], random)[0].numpy()


class Seeded:
    """Normal numbers of one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=self.generator)

    def poisson(self, rate: torch.Tensor) -> torch.Tensor:
        return torch.poisson(rate, generator=self.generator)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure the denoising of volumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--volume", default="data/colin27/colin27_t1.nii.gz", help="without noise")
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--slices", type=positive, default=32, help="of the volume")
    add("--middle", type=int, help="of the slices, counted from 0; by default the volume's")
    add("--seed", type=int, default=0, help="of the noise")
    add("--crop", type=positive, default=144, help="rows and columns, about the middle")
    add("--classical", action="store_true", help="without this program's own")
    add("--out", default=PATH, help="the CSV")
    return parser.parse_args(argv)


def part_of(args: argparse.Namespace, truth: Volume) -> str:
    """What is denoised, in words."""
    name = os.path.basename(args.volume).split(".")[0]
    about = "" if args.middle is None else f" about slice {args.middle}"
    return f"{name} {'×'.join(map(str, truth.shape))}{about}, seed {args.seed}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    truth = load(args)
    mask = np.stack([head_mask(s[None]) for s in truth])
    prior = load_prior(args.model_config, "cpu")
    part = part_of(args, truth)
    rows = Rows(args.out, COLUMNS, KEY, prior.digest[:12])
    for percent in PERCENT:
        M = noisy(truth, percent, args.seed)
        for name, make in methods(prior, M, 2 * percent / 100).items():
            if not (args.classical and name.startswith(OURS)):
                key = {"part": part, "noise_percent": str(percent), "method": name}
                rows.measure(key, partial(figures, make, truth, mask))
    return 0


def figures(
    make: Callable[[], Volume], truth: Volume, mask: NDArray[np.bool_]
) -> dict[str, float | str]:
    """The measures of what is made, and the CPU's seconds."""
    start = time.process_time()
    x = make()
    seconds = time.process_time() - start
    metrics = image_metrics(x, truth, mask)
    return {k: metrics[k] for k in ("psnr", "ssim", "haarpsi")} | {"seconds": seconds}


if __name__ == "__main__":
    sys.exit(status_of(main))
