"""Accelerated MRI against methods without a learned prior: ``python tests/benchmarks/kspace.py``.

Undersamples validation slices as `configs/mri_recon_config.yaml` does, with a mask of each slice's
own name, so that the offsets of the masks are averaged over, and restores the same measurements by
all methods. All of them know the coils' maps and the object's phase, and that the image is real;
those named `_estimated` find maps and phase by themselves, restore a complex image, and put back
what it misses of the measurement beyond noise.
Weights of the classical methods and λ of DMPS are chosen on other slices, the tuning ones. Writes
one row for each image to saved_results/benchmarks/kspace.csv, and resumes; --plan says how long it
would take.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.dataloader import list_images, read_image
from data.kspace import Acquisition
from guided_diffusion import Measurement, NoiseConfig, OperatorConfig, load_prior, restore
from guided_diffusion.config import read_schedule
from guided_diffusion.intervals import factors_path, load_factor, save_factors
from guided_diffusion.operators import get_operator
from guided_diffusion.operators.base import Operator
from guided_diffusion.operators.coils import simulated_maps, smooth_phase
from guided_diffusion.operators.mri import MRI, from_hybrid
from guided_diffusion.operators.scanned import kspace_of
from guided_diffusion.operators.several_coils import several_coils
from guided_diffusion.scan import look, prepare
from guided_diffusion.statistics import NATURAL_IMAGES
from tests.benchmarks import deepinv_methods
from tests.benchmarks.kspace_classical import CLASSICAL
from tests.benchmarks.kspace_rows import COLUMNS, KEY, Table, key_of, known_seen, lines
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.run_all import Speed, duration
from util.errors import ArgumentParser, UserError, status_of
from util.metrics import calibration, image_metrics
from util.random import ImageRandom, image_generator

CENTRE = {4: 0.08, 8: 0.04}
EVERY, TUNING = 26, 13  # every so many slices from the first; the tuning ones from this on
ESTIMATED = "_estimated"
PEERS = {"deepinv_ddrm_20": "deepinv_ddrm", "deepinv_diffpir_20": "deepinv_diffpir"}
UNKNOWN_SECONDS = 20.0  # of an image by a classical method that has no row yet
PEER_STEPS = 20  # of deepinv's methods, which pip install deepinv brings


class Ours(NamedTuple):
    """A method of this program, with its schedule.

    Attributes:
        evaluations: of the network, of one sample.
        first: of the first reconstruction besides, where maps and phase are estimated.
        scales: λ of DMPS, of which the best in tuning is taken.
    """

    schedule: str
    method: str
    evaluations: int
    samples: int = 1
    first: int = 0
    scales: tuple[float, ...] = ()


FAST = "configs/diffusion_config_fast.yaml"
OURS = {
    "spectral_10": Ours(FAST, "spectral", 10),
    "spectral_10_estimated": Ours(FAST, "spectral", 10, first=10),
    "dmps_100": Ours("configs/diffusion_config_100.yaml", "dmps", 100, scales=(1.0, 1.75)),
    "spectral_10x8": Ours(FAST, "spectral", 10, samples=8),
    "spectral_sample_20x8": Ours("configs/diffusion_config_samples.yaml", "spectral_sample", 20, 8),
}
SELECTED = (2, 5, 8)  # of the ten slices, those that several samples are drawn of
METHODS = (*CLASSICAL, *OURS, *PEERS)


def weights_of(method: str) -> tuple[float, ...]:
    """Of which the best in tuning is taken; (0.0,) where there is nothing to tune."""
    if method in CLASSICAL:
        return CLASSICAL[method][1]
    return (method in OURS and OURS[method].scales) or (0.0,)


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

    def suits(self, method: str) -> bool:
        """Whether the method can restore it: deepinv's need an SVD."""
        return not (method in PEERS and self.coils > 1 and self.mask == "poisson")


LINES = "equispaced_fraction"
CASES = {
    f"{coils}x{R}_{sigma}": Case(coils, LINES, R, sigma)
    for coils in (1, 8)
    for R in (4, 8)
    for sigma in (0.01, 0.05)
}
CASES |= {
    f"{coils}x{R}_{sigma}_poisson": Case(coils, "poisson", R, sigma)
    for coils, R, sigma in ((1, 4, 0.01), (8, 4, 0.01), (8, 8, 0.01), (8, 8, 0.05))
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--val", metavar="PATH", required=True, help="folder of validation slices, not shipped")
    help = "coils x acceleration _ noise; by default all"
    add("--cases", nargs="+", default=list(CASES), choices=CASES, help=help)
    own = [m for m in METHODS if not m.startswith("deepinv")]
    add("--methods", nargs="+", default=own, choices=METHODS, help="by default all but deepinv's")
    add("--images", nargs="+", type=int, default=range(10), help="which of the ten slices")
    add("--tuning_images", nargs="+", type=int, default=[2, 6], help="of the ten tuning slices")
    help = "measure several samples on tuning slices alone; widen intervals by what they tell"
    add("--factors", action="store_true", help=help)
    add("--plan", action="store_true", help="only say how long it would take")
    add("--table", action="store_true", help="print the means of what is measured")
    return parser.parse_args(argv)


def measure(case: Case, method: str, weight: float, name: str, truth: torch.Tensor, prior):
    """(restored (1, H, W) in [-1, 1], samples (K, 1, H, W) or None, seconds, the operator)."""
    operator, samples = case.operator(name, tuple(truth.shape)), None
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
        else:
            b = operator.transpose(y + operator.offset())
            x = CLASSICAL[method][0](operator.normal, b, weight)[0] - 1
    else:
        ours = OURS[method]
        measurement = Measurement(
            OperatorConfig("mri", case.parameters_of(name)),
            NoiseConfig("gaussian", case.sigma),
            simulated=True,
        )
        found = restore(
            truth[None], measurement, prior, ours.method, ours.schedule,
            {"scale": weight} if ours.scales else None,
            names=[name], num_samples=ours.samples,
        )  # fmt: skip
        x = torch.from_numpy(found.mean[0])
        samples = found.samples[0] if ours.samples > 1 else None
    return x, samples, time.perf_counter() - start, operator


def scanned(case: Case, name: str, truth: torch.Tensor, mask) -> Acquisition:
    """The scan of an object that has a phase, one coil's, too."""
    height, width = truth.shape[-2:]
    phase = smooth_phase(height, width)[None]
    maps = torch.polar(torch.ones_like(phase), phase)
    maps = maps if case.coils == 1 else simulated_maps(case.coils, height, width)
    y = several_coils(mask, maps, "columns").forward(truth[None] + 1)
    y = y + case.sigma * ImageRandom([image_generator(name, "measurement", 0)]).randn_like(y)
    points = mask.ndim == 2
    kspace = kspace_of(y, torch.from_numpy(mask.copy())) if points else from_hybrid(y, mask)
    return Acquisition(kspace[0].numpy(), mask, "columns", 2.0, complete=False)


def estimated(case: Case, method: str, weight: float, name: str, truth, mask, prior):
    """The magnitude, (1, H, W), maps and phase being estimated."""
    acquisition, parameters = scanned(case, name, truth, mask), MRI.check({})
    if method in CLASSICAL:
        first = look(acquisition, parameters, case.sigma, NATURAL_IMAGES, torch.device("cpu"))
        z = CLASSICAL[method][0](first.normal, first.adjoint(first.hybrid), weight)
        return first.magnitude(z) - 1  # as `Scan` is shown
    ours = OURS[method]
    arguments = read_schedule(ours.schedule).sampler_arguments()
    random = ImageRandom([image_generator(name, "phase", 0)])
    scan = prepare(acquisition, parameters, case.sigma, prior, arguments, random.randn_like)
    measurement = Measurement(
        OperatorConfig("mri", {}), NoiseConfig("gaussian", case.sigma), simulated=False
    )
    found = restore(
        truth[None], measurement, prior, ours.method, ours.schedule, names=[name], scan=scan
    )
    return torch.from_numpy(found.mean[0])


def seen(operator: Operator, sigma: float) -> str:
    """Share of the image's directions that y tells more of than noise: singular values above σ."""
    if not operator.has_svd:
        return ""
    count = int((operator.singular_values > sigma).sum())
    return f"{count / np.prod(operator.in_shape):.3f}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.makedirs(FOLDER, exist_ok=True)
    path = os.path.join(FOLDER, "kspace.csv")
    if args.table:
        print("\n".join(lines(Table(path))))
        return 0
    paths = list_images(args.val)
    sets = {"val": paths[::EVERY], "tuning": paths[TUNING::EVERY]}
    most = max(max(args.images) * EVERY, max(args.tuning_images) * EVERY + TUNING)
    if len(paths) <= most:
        raise UserError(
            f"--val: expected more than {most} slices, of which every {EVERY}th is taken, found "
            f"{len(paths)} in {args.val}"
        )
    prior = None if set(args.methods) <= set(CLASSICAL) else load_prior()
    table = Table(path, prior.digest[:8] if prior else "")
    if args.plan:
        print("\n".join(plan(args, sets, table, prior)))
        return 0
    table.write()
    if args.factors:
        measure_factors(args, sets["tuning"], table, prior)
        return 0
    for name in args.cases:
        for method in args.methods:
            if CASES[name].suits(method):
                run(CASES[name], method, args, sets, table, prior)
    print("\n".join(lines(table)))
    return 0


def measure_factors(args: argparse.Namespace, paths: list[str], table: Table, prior) -> None:
    """Keep beside the weights how much wider the intervals of several samples must be."""
    factors = {}
    for method in (m for m in args.methods if m in OURS and OURS[m].samples > 1):
        found = []
        for case in (CASES[name] for name in args.cases):
            for i in args.tuning_images:
                known = case, method, 0.0, "tuning", paths[i]
                row_of(*known, table, prior)
                found.append(float(table.rows[key_of(identified(*known))]["rescale"]))
        factors[OURS[method].method] = {"mri": round(float(np.mean(found)), 4)}
    source = f"{len(args.cases)} cases of mri, {len(args.tuning_images)} tuning slices each"
    save_factors(prior, factors, source, factors_path(prior.config.model_path))


def images_of(method: str, args: argparse.Namespace) -> list[int]:
    """Which of the ten slices a method restores."""
    several = method in OURS and OURS[method].samples > 1
    return [i for i in args.images if not several or i in SELECTED]


def run(case: Case, method: str, args: argparse.Namespace, sets: dict, table: Table, prior) -> None:
    """Measure one case by one method; its weight is that of the best PSNR in tuning."""
    weights = weights_of(method)
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
        table.forget_weights(identified(case, method, best, "val", ""))
    for i in images_of(method, args):
        row_of(case, method, best, "val", sets["val"][i], table, prior)


def identified(case: Case, method: str, weight: float, where: str, path: str) -> dict[str, str]:
    """The columns that tell a row from others."""
    name = os.path.splitext(os.path.basename(path))[0]
    values = (case.coils, case.mask, case.R, case.sigma, method, weight, where, name)
    return {k: str(v) for k, v in zip(KEY, values, strict=True)}


def row_of(case: Case, method: str, weight: float, where: str, path: str, table: Table, prior):
    """The PSNR of one image, from the table if it is there."""
    row = identified(case, method, weight, where, path)
    key = key_of(row)
    if key not in table.rows:
        truth = torch.from_numpy(read_image(path))
        x, samples, seconds, operator = measure(case, method, weight, row["image"], truth, prior)
        metrics = image_metrics(x.numpy(), truth.numpy())
        row |= {"true_R": f"{1 / operator.mask.mean():.3f}", "seconds": f"{seconds:.3g}"}
        row |= {k: f"{metrics[k]:.5g}" for k in ("psnr", "ssim", "haarpsi")}
        row["seen"] = known_seen(table, row) or seen(operator, case.sigma)
        row["in_90"] = row["rescale"] = ""
        if samples is not None:
            factor = load_factor(prior, OURS[method].method, "mri") or 1.0
            found = calibration(samples, truth.numpy(), factor=factor)
            row |= {k: f"{found[k]:.3f}" for k in ("in_90", "rescale")}
        row["prior"] = "" if method in CLASSICAL else table.digest
        table.add({k: row[k] for k in COLUMNS})
        print(*(table.rows[key][k] for k in COLUMNS), flush=True)
    return float(table.rows[key]["psnr"])


def plan(args: argparse.Namespace, sets: dict, table: Table, prior) -> Iterator[str]:
    """What is left to measure of each method, with the time that it takes here."""
    speed, whole = Speed(prior) if prior else None, 0.0
    for method in args.methods:
        left = []
        for case in (CASES[name] for name in args.cases if CASES[name].suits(method)):
            weights = weights_of(method)
            rows = [("val", i, None) for i in images_of(method, args)]
            if len(weights) > 1:
                rows += [("tuning", i, w) for i in args.tuning_images for w in weights]
            for where, i, weight in rows:
                known = (
                    identified(case, method, w, where, sets[where][i])
                    for w in ((weight,) if weight is not None else weights)
                )
                if not any(key_of(row) in table.rows for row in known):
                    left.append(seconds_of(case, method, table, speed))
        whole += sum(left)
        yield f"{method}: {len(left)} images, about {duration(sum(left))}"
    yield f"all: about {duration(whole)}"


def seconds_of(case: Case, method: str, table: Table, speed: Speed | None) -> float:
    """Of one image: those of the table's rows, or else the network's evaluations alone."""
    rows = [
        float(row["seconds"])
        for row in table.rows.values()
        if row["method"] == method and row["coils"] == str(case.coils)
    ]
    if rows or speed is None or method in CLASSICAL:
        return float(np.median(rows)) if rows else UNKNOWN_SECONDS
    if method in PEERS:
        return PEER_STEPS * speed.seconds(False)
    ours = OURS[method]
    return (ours.samples * ours.evaluations + ours.first) * speed.seconds(False)


if __name__ == "__main__":
    sys.exit(status_of(main))
