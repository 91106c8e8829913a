"""Accelerated MRI against methods without a learned prior: ``python tests/benchmarks/kspace.py``.

Undersamples validation slices as `configs/mri_recon_config.yaml` does, with a mask of each slice's
own name, so that the offsets of the masks are averaged over, and restores the same measurements by
all methods. All of them know the coils' maps and the object's phase, and that the image is real;
those named `_estimated` find maps and phase by themselves, and restore a complex image.
Weights of the classical methods are chosen on other slices, the tuning ones. Writes one row for
each image to saved_results/benchmarks/kspace.csv, and resumes; --table prints the means.
"""

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.dataloader import list_images, read_image
from data.kspace import Acquisition
from guided_diffusion import Measurement, NoiseConfig, OperatorConfig, load_prior, restore
from guided_diffusion.config import read_schedule
from guided_diffusion.operators import get_operator
from guided_diffusion.operators.base import Operator
from guided_diffusion.operators.coils import simulated_maps, smooth_phase
from guided_diffusion.operators.mri import MRI, from_hybrid
from guided_diffusion.operators.several_coils import Coils
from guided_diffusion.scan import look, prepare
from guided_diffusion.statistics import NATURAL_IMAGES
from tests.benchmarks import deepinv_methods
from tests.benchmarks.rows import FOLDER
from util.errors import ArgumentParser
from util.files import replacing_text
from util.metrics import image_metrics
from util.random import ImageRandom, image_generator

CENTRE = {4: 0.08, 8: 0.04}
EVERY, TUNING = 26, 13  # every so many slices from the first; the tuning ones from this on
COLUMNS = ("coils", "mask", "R", "true_R", "sigma", "method", "weight", "set", "image")
COLUMNS += ("psnr", "ssim", "haarpsi", "seconds", "prior")
KEY = COLUMNS[:3] + COLUMNS[4:9]
SCHEDULES = {  # method: the schedule and the method's name
    "spectral_10": ("configs/diffusion_config_fast.yaml", "spectral"),
    "spectral_10_estimated": ("configs/diffusion_config_fast.yaml", "spectral"),
    "dmps_100": ("configs/diffusion_config_100.yaml", "dmps"),
}
Normal = Callable[[torch.Tensor], torch.Tensor]


def zero_filled(normal: Normal, b: torch.Tensor, weight: float) -> torch.Tensor:
    """Aᵀy alone."""
    return b


def sense(normal: Normal, b: torch.Tensor, weight: float) -> torch.Tensor:
    """CG-SENSE (Pruessmann et al. 2001): (AᵀA + λ) u = Aᵀy by 30 conjugate gradients."""
    u, left = torch.zeros_like(b), b
    direction, square = left, left.square().sum()
    enough = 1e-10 * square  # beyond it float32 has nothing to say
    for _ in range(30):
        if square <= enough:
            break
        image = normal(direction) + weight * direction
        step = square / (direction * image).sum()
        u, left = u + step * direction, left - step * image
        new = left.square().sum()
        direction, square = left + new / square * direction, new
    return u


def total_variation(normal: Normal, b: torch.Tensor, weight: float, steps=800) -> torch.Tensor:
    """min ½‖Au - y‖² + λ‖∇u‖₁ to convergence, by Condat & Vũ (2013); anisotropic, circular."""
    dual = 0.01
    primal = 1 / (0.5 + 8 * dual)
    u, p, q = b, torch.zeros_like(b), torch.zeros_like(b)
    for _ in range(steps):
        back = p.roll(1, -1) - p + q.roll(1, -2) - q
        new = u - primal * (normal(u) - b + back)
        ahead = 2 * new - u
        p = within(p + dual * (ahead.roll(-1, -1) - ahead), weight)
        q = within(q + dual * (ahead.roll(-1, -2) - ahead), weight)
        u = new
    return u


def within(x: torch.Tensor, radius: float) -> torch.Tensor:
    """x, real or complex, its magnitude at most `radius`."""
    if not x.is_complex():
        return x.clamp(-radius, radius)
    return x * (radius / x.abs().clamp(min=radius))


def wavelet(normal: Normal, b: torch.Tensor, weight: float) -> torch.Tensor:
    """min ½‖Au - y‖² + λ‖Wu‖₁, W Daubechies 4, by 100 steps of FISTA (Beck & Teboulle 2009)."""
    import pywt  # optional, of tests/requirements.txt

    u, ahead, t = b, b, 1.0
    for _ in range(100):
        image = (ahead - normal(ahead) + b)[0, 0].numpy()
        levels = pywt.wavedec2(image, "db4", mode="periodization", level=4)
        array, slices = pywt.coeffs_to_array(levels)
        coarse = array[slices[0]].copy()
        array = np.sign(array) * np.maximum(np.abs(array) - weight, 0)
        array[slices[0]] = coarse
        levels = pywt.array_to_coeffs(array, slices, output_format="wavedec2")
        new = torch.from_numpy(pywt.waverec2(levels, "db4", mode="periodization"))[None, None]
        later = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead, u, t = new + (t - 1) / later * (new - u), new, later
    return u


CLASSICAL = {
    "zero_filled": (zero_filled, (0.0,)),
    "sense": (sense, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "wavelet": (wavelet, (0.001, 0.003, 0.008, 0.02, 0.05)),
    "tv": (total_variation, (0.0003, 0.001, 0.003, 0.008, 0.02, 0.05)),
    "tv_estimated": (total_variation, (0.0003, 0.001, 0.003, 0.008, 0.02, 0.05)),
}
ESTIMATED = "_estimated"
PEERS = {"deepinv_ddrm_20": "deepinv_ddrm", "deepinv_diffpir_20": "deepinv_diffpir"}
PEER_STEPS = 20  # of deepinv's methods, which pip install deepinv brings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--val", metavar="PATH", required=True, help="folder of validation slices, not shipped")
    add("--coils", nargs="+", type=int, default=[1, 8])
    add("--accelerations", nargs="+", type=int, default=[4, 8], choices=CENTRE)
    add("--sigmas", nargs="+", type=float, default=[0.01, 0.05])
    add("--masks", nargs="+", default=["equispaced_fraction"])
    known = [*CLASSICAL, *SCHEDULES, *PEERS]
    add("--methods", nargs="+", default=[*CLASSICAL, *SCHEDULES], choices=known)
    add("--images", nargs="+", type=int, default=range(10), help="which of the ten slices")
    add("--tuning_images", nargs="+", type=int, default=[2, 6], help="of the ten tuning slices")
    add("--table", action="store_true", help="print the means of what is measured")
    return parser.parse_args(argv)


class Table:
    """kspace.csv; every row is on the disk when `add` returns.

    Rows of another prior than `digest` are left out; "" takes them all.
    """

    def __init__(self, path: str, digest: str = ""):
        self.path, self.digest, self.rows = path, digest, {}
        if not os.path.exists(path):
            return
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if not digest or row["prior"] in ("", digest):
                    self.rows[tuple(row[k] for k in KEY)] = row
        if digest:
            with replacing_text(path) as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows.values())

    def add(self, row: dict[str, str]) -> None:
        new = not os.path.exists(self.path)
        self.rows[tuple(row[k] for k in KEY)] = row
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


class Case:
    """One kind of scan: coils, mask, acceleration, noise."""

    def __init__(self, coils: int, mask: str, R: int, sigma: float):
        self.sigma = sigma
        self.coils, self.mask, self.R = coils, mask, R
        self.parameters = {
            "mask": mask, "acceleration": R, "center_fraction": CENTRE[R], "coils": coils,
        }  # fmt: skip

    def parameters_of(self, name: str) -> dict:
        return {**self.parameters, "mask_seed": name}

    def operator(self, name: str, shape: tuple[int, ...]) -> Operator:
        return get_operator("mri", shape, **self.parameters_of(name))


def measure(case: Case, method: str, weight: float, name: str, truth: torch.Tensor, prior):
    """(restored (1, H, W) in [-1, 1], seconds, the operator)."""
    operator = case.operator(name, tuple(truth.shape))
    start = time.perf_counter()
    if method.endswith(ESTIMATED):
        x = estimated(case, method, weight, name, truth, operator.mask, prior)
    elif method in CLASSICAL or method in PEERS:
        random = ImageRandom([image_generator(name, "measurement", 0)])
        y = operator.forward(truth[None])
        y = y + case.sigma * random.randn_like(y)
        if method in PEERS:
            known = operator, y, case.sigma, SimpleNamespace(truth=truth[None], name=name), prior
            x = deepinv_methods.restore(PEERS[method], *known, PEER_STEPS, 0)[0]
            return x, time.perf_counter() - start, operator
        b = operator.transpose(y + operator.offset())
        x = CLASSICAL[method][0](operator.normal, b, weight)[0] - 1
    else:
        schedule, of = SCHEDULES[method]
        measurement = Measurement(
            OperatorConfig("mri", case.parameters_of(name)),
            NoiseConfig("gaussian", case.sigma),
            simulated=True,
        )
        found = restore(truth[None], measurement, prior, of, schedule, names=[name])
        x = torch.from_numpy(found.mean[0])
    return x, time.perf_counter() - start, operator


def scanned(case: Case, name: str, truth: torch.Tensor, mask) -> Acquisition:
    """The scan of an object that has a phase, one coil's, too."""
    height, width = truth.shape[-2:]
    phase = smooth_phase(height, width)[None]
    maps = torch.polar(torch.ones_like(phase), phase)
    operator = Coils(mask, maps if case.coils == 1 else simulated_maps(case.coils, height, width))
    y = operator.forward(truth[None] + 1)
    y = y + case.sigma * ImageRandom([image_generator(name, "measurement", 0)]).randn_like(y)
    return Acquisition(from_hybrid(y, mask)[0].numpy(), mask, "columns", 2.0, complete=False)


def estimated(case: Case, method: str, weight: float, name: str, truth, mask, prior):
    """The magnitude, (1, H, W), maps and phase being estimated."""
    acquisition, parameters = scanned(case, name, truth, mask), MRI.check({})
    if method in CLASSICAL:
        first = look(acquisition, parameters, case.sigma, NATURAL_IMAGES, torch.device("cpu"))
        z = CLASSICAL[method][0](first.normal, first.adjoint(first.hybrid), weight)
        return z.abs().square().sum(dim=0).sqrt() - 1
    schedule, of = SCHEDULES[method]
    arguments = read_schedule(schedule).sampler_arguments()
    random = ImageRandom([image_generator(name, "phase", 0)])
    scan = prepare(acquisition, parameters, case.sigma, prior, arguments, random.randn_like)
    measurement = Measurement(
        OperatorConfig("mri", {}), NoiseConfig("gaussian", case.sigma), simulated=False
    )
    found = restore(truth[None], measurement, prior, of, schedule, names=[name], scan=scan)
    return torch.from_numpy(found.mean[0])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.makedirs(FOLDER, exist_ok=True)
    path = os.path.join(FOLDER, "kspace.csv")
    if args.table:
        print("\n".join(lines(Table(path))))
        return 0
    paths = list_images(args.val)
    sets = {"val": paths[::EVERY], "tuning": paths[TUNING::EVERY]}
    prior = None if set(args.methods) <= set(CLASSICAL) else load_prior()
    table = Table(path, prior.digest[:8] if prior else "")
    for coils in args.coils:
        for mask in args.masks:
            for R in args.accelerations:
                for sigma in args.sigmas:
                    run(Case(coils, mask, R, sigma), args, sets, table, prior)
    print("\n".join(lines(table)))
    return 0


def run(case: Case, args: argparse.Namespace, sets: dict, table: Table, prior) -> None:
    """Measure one case by all methods; the weight of each is that of the best PSNR in tuning."""
    for method in args.methods:
        weights = CLASSICAL[method][1] if method in CLASSICAL else (0.0,)
        best = weights[0]
        if len(weights) > 1:
            found = {
                w: np.mean([
                    row_of(case, method, w, "tuning", sets["tuning"][i], table, prior)
                    for i in args.tuning_images
                ])
                for w in weights
            }  # fmt: skip
            best = max(found, key=lambda w: found[w])
        for i in args.images:
            row_of(case, method, best, "val", sets["val"][i], table, prior)


def row_of(case: Case, method: str, weight: float, where: str, path: str, table: Table, prior):
    """The PSNR of one image, from the table if it is there."""
    name = os.path.splitext(os.path.basename(path))[0]
    row = {
        "coils": case.coils, "mask": case.mask, "R": case.R, "sigma": case.sigma,
        "method": method, "weight": weight, "set": where, "image": name,
    }  # fmt: skip
    row = {k: str(v) for k, v in row.items()}
    key = tuple(row[k] for k in KEY)
    if key not in table.rows:
        truth = torch.from_numpy(read_image(path))
        x, seconds, operator = measure(case, method, weight, name, truth, prior)
        metrics = image_metrics(x.numpy(), truth.numpy())
        lines_measured = np.asarray(operator.mask).mean()
        row |= {"true_R": f"{1 / lines_measured:.3f}", "seconds": f"{seconds:.3g}"}
        row |= {k: f"{metrics[k]:.5g}" for k in ("psnr", "ssim", "haarpsi")}
        row["prior"] = "" if method in CLASSICAL else table.digest
        table.add({k: row[k] for k in COLUMNS})
        print(*(table.rows[key][k] for k in COLUMNS), flush=True)
    return float(table.rows[key]["psnr"])


def lines(table: Table) -> Iterator[str]:
    """The means over the validation slices, as a table in Markdown."""
    yield "| coils | mask | R (true) | σ | method | λ | images | PSNR | SSIM | HaarPSI | s |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    groups: dict[tuple, list[dict]] = {}
    for row in table.rows.values():
        if row["set"] == "val":
            group = ("coils", "mask", "R", "sigma", "method", "weight")
            groups.setdefault(tuple(row[k] for k in group), []).append(row)
    for (coils, mask, R, sigma, method, weight), rows in sorted(groups.items()):
        mean = {k: np.mean([float(r[k]) for r in rows]) for k in COLUMNS[-5:-1] + ("true_R",)}
        shown = weight if float(weight) else ""
        yield (
            f"| {coils} | {mask} | {R} ({mean['true_R']:.2f}) | {sigma} | {method} | {shown} | "
            f"{len(rows)} | {mean['psnr']:.2f} | {mean['ssim']:.4f} | {mean['haarpsi']:.4f} | "
            f"{mean['seconds']:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
