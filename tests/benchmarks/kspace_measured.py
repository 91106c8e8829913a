"""A measured scan, undersampled: ``python tests/benchmarks/kspace_measured.py --scan FILE``.

--scan is a fully sampled file of k-space that `data.kspace` reads. Of its middle slice (--slice),
lines are left out along its columns and along its rows, as `equispaced_fraction` does, and what is
left is reconstructed by this program (`spectral`, ten evaluations after the ten of its first
reconstruction), by total variation (800 iterations) and by L1-wavelets (100). Maps and phase are
estimated by all, in the same way. The truth is the root of the sum of squares of the complete scan,
with its noise, so all keep the lines that were measured. Total variation and wavelets are measured
with each weight, and the tables show their best: on this very scan, so they are upper bounds. A row
for each goes to saved_results/benchmarks/kspace_measured.csv; only what is missing there is
measured.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.kspace import Acquisition, KSpaceVolume
from guided_diffusion import Measurement, NoiseConfig, OperatorConfig, load_prior, restore
from guided_diffusion.config import read_schedule
from guided_diffusion.operators.mri import MRI
from guided_diffusion.prior import SHIPPED, Prior
from guided_diffusion.restoration import FAST
from guided_diffusion.scan import look, mask_of, prepare
from tests.benchmarks.kspace import CENTRE
from tests.benchmarks.kspace_classical import total_variation, wavelet
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.volume_rows import OURS, Rows
from util.errors import ArgumentParser, UserError, status_of
from util.flags import positive
from util.metrics import image_metrics
from util.random import ImageRandom, image_generator

COLUMNS = ("scan", "axis", "R", "true_R", "method", "weight", "psnr", "ssim", "haarpsi", "seconds")
COLUMNS += ("prior",)
KEY = ("scan", "axis", "R", "method", "weight")
SPECTRAL = f"{OURS}, spectral"
CLASSICAL = {
    "total variation": (total_variation, (0.0003, 0.001, 0.003, 0.008)),
    "L1-wavelets": (wavelet, (0.001, 0.003, 0.008, 0.02)),
}
METHODS = (*CLASSICAL, SPECTRAL)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure reconstructions of a measured scan.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--scan", required=True, help="a fully sampled file of k-space")
    add("--order", help="names of an array's axes, see data.order")
    add("--slice", type=int, help="of the file; by default the middle one")
    add("--accelerations", nargs="+", type=positive, default=[2, 3, 4])
    add("--axes", nargs="+", default=["columns", "rows"], choices=["columns", "rows"])
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--out", default=os.path.join(FOLDER, "kspace_measured.csv"), help="the CSV")
    return parser.parse_args(argv)


def along(acquisition: Acquisition, axis: str) -> Acquisition:
    """The same complete scan, phase encoded along an axis.

    Raises:
        UserError: the scan has gaps, so its lines run along its own axis alone.
    """
    if axis == acquisition.axis:
        return acquisition
    if not acquisition.mask.all():
        raise UserError(f"--axes {axis}: lines of k-space are empty along {acquisition.axis}")
    size = acquisition.kspace.shape[-1 if axis == "columns" else -2]
    return replace(acquisition, axis=axis, mask=np.ones(size, bool))


def parameters_of(R: int, axis: str) -> dict:
    """Those of the operator `mri`; the centre is fastMRI's for 4, and wider for less."""
    centre = CENTRE.get(R, CENTRE[4] * 4 / R if R < 4 else CENTRE[8])
    values = {"acceleration": R, "center_fraction": centre, "axis": axis, "keep_measured": True}
    return MRI.check(values)


def reconstruct(
    acquisition: Acquisition, R: int, method: str, weight: float, prior: Prior, name: str
) -> torch.Tensor:
    """(1, H, W) in [-1, 1], black at -1."""
    parameters = parameters_of(R, acquisition.axis)
    if method in CLASSICAL:
        first = look(acquisition, parameters, None, prior.statistics, prior.device)
        z = CLASSICAL[method][0](first.normal, first.adjoint(first.hybrid), weight)
        return first.magnitude(z, keep_measured=True) - 1
    arguments = read_schedule(FAST).sampler_arguments()
    random = ImageRandom([image_generator(name, "phase", 0)])
    scan = prepare(acquisition, parameters, None, prior, arguments, random.randn_like)
    measurement = Measurement(
        OperatorConfig("mri", {}), NoiseConfig("gaussian", scan.sigma), simulated=False
    )
    truth = torch.zeros(1, 1, *acquisition.kspace.shape[-2:])
    found = restore(truth, measurement, prior, "spectral", FAST, names=[name], scan=scan)
    return torch.from_numpy(found.mean[0])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return status_of(partial(measure, args))


def measure(args: argparse.Namespace) -> None:
    volume = KSpaceVolume(args.scan, os.path.basename(args.scan), args.order, measured=False)
    index = len(volume.slices) // 2 if args.slice is None else args.slice
    truth, whole = volume.slices[index].read(), volume.slices[index].acquisition()
    prior = load_prior(args.model_config, "cpu")
    rows = Rows(args.out, COLUMNS, KEY, prior.digest[:12])
    name = f"{volume.name} {truth.shape[-2]}×{truth.shape[-1]}"

    def found(acquisition: Acquisition, R: int, method: str, weight: float) -> dict:
        start = time.process_time()
        x = reconstruct(acquisition, R, method, weight, prior, name)
        seconds = time.process_time() - start
        mask = mask_of(acquisition, parameters_of(R, acquisition.axis))
        ratings = image_metrics(x.numpy(), truth)
        ratings = {k: ratings[k] for k in ("psnr", "ssim", "haarpsi")}
        return {"true_R": float(1 / mask.mean()), **ratings, "seconds": seconds}

    for axis in args.axes:
        acquisition = along(whole, axis)
        for R in args.accelerations:
            for method in args.methods:
                for weight in CLASSICAL[method][1] if method in CLASSICAL else (0.0,):
                    key = {"scan": name, "axis": axis, "R": str(R), "method": method}
                    key |= {"weight": str(weight)}
                    rows.measure(key, partial(found, acquisition, R, method, weight))


if __name__ == "__main__":
    sys.exit(main())
