"""Denoising of real scans, of which no truth is known: ``python tests/benchmarks/volume_real.py``.

The middle --slices of each of --scans (NIfTI files or folders of a DICOM series), --crop rows and
columns of each, are restored as they are, with σ as the program estimates it, by the methods of
`volume_denoising.py`, and by this program with the map of σ that it estimates. What can be said
without a truth is said of y - x̂ within the head:

removed     its root mean square, in units of σ, or of its map: 1, if all the noise was taken and
            nothing else (less where noise is left; a magnitude's noise is a little weaker in the
            dark)
edges       the same in the tenth of the voxels where brightness changes most, over that of the
            others: 1 for noise, more where edges were taken with it
in_plane    its largest autocorrelation over lags of about 1 to 7 pixels; across: with the next
            slice. 0 for white noise; a scanner that filters or interpolates makes noise that is not
            white, so compare the methods

Writes a row for each method to saved_results/benchmarks/volume_real.csv, measures only what is
missing there, and makes saved_results/volume_real.png anew when something was.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import gaussian_gradient_magnitude

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.dataloader import list_items
from data.masks import head_mask
from data.volumes import Volume as Scan
from data.volumes import Whole
from guided_diffusion.config import read_schedule
from guided_diffusion.evidence import across_slices, autocorrelation, rings
from guided_diffusion.item_noise import ItemSigmas, estimated_map
from guided_diffusion.measuring import noise_of
from guided_diffusion.prior import SHIPPED, Prior, load_prior
from guided_diffusion.restoration import FAST
from guided_diffusion.volumes import AsVolume, is_isotropic
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.settings import REPOSITORY
from tests.benchmarks.thick_slices import cut
from tests.benchmarks.volume_denoising import MEASURED, VARYING, Volume, methods, ours
from tests.benchmarks.volume_rows import Rows
from util.errors import ArgumentParser, status_of
from util.flags import positive
from util.image_files import write_png

COLUMNS = ("scan", "shape", "sigma_percent", "method", "removed", "edges", "in_plane", "across")
COLUMNS += ("seconds", "prior")
KEY = ("scan", "shape", "method")
MAPPED = "ours, map of σ"
EDGES = 0.1  # share of the head's voxels that are called edges
SMOOTH = 1.0  # voxels: of the gradient that finds them
FIGURE = os.path.join(REPOSITORY, "saved_results", "volume_real.png")
Shown = tuple[str, NDArray[np.float32], NDArray[np.float32]]  # see `Case.shown`


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Denoise real scans.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--scans", nargs="+", default=[], help="NIfTI files or folders of a DICOM series")
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--slices", type=positive, default=16, help="of each scan, about its middle")
    add("--crop", type=positive, default=128, help="rows and columns, about the middle")
    add("--out", default=os.path.join(FOLDER, "volume_real.csv"), help="the CSV")
    add("--figure", default=FIGURE, help="the picture")
    return parser.parse_args(argv)


def way_of(scan: Scan) -> AsVolume:
    """How main.py restores the scan."""
    plane, spacing = scan.plane, scan.spacing
    in_turn = is_isotropic(spacing, plane.pixel, plane.longer)
    world = {"world": plane.world, "upward": plane.upward}
    return AsVolume(chunk=1, spacing=None if in_turn else spacing, in_turn=in_turn, **world)


@dataclass
class Case:
    """A scan and what restores it.

    Attributes:
        y: as it was scanned; sigma: of its noise; head: where it is, (D, H, W); sigma_map: of its
            noise, voxel by voxel, for the method `MAPPED`.
        restoring: what restores y, by its name; the first gives y itself.
        restored: what has been.
    """

    y: Volume
    sigma: float
    head: NDArray[np.bool_]
    sigma_map: Volume | None = None
    restoring: dict[str, Callable[[], Volume]] = field(default_factory=dict)
    restored: dict[str, Volume] = field(default_factory=dict)

    @classmethod
    def of(cls, scan: Scan, prior: Prior, slices: int, crop: int) -> "Case":
        sigmas = ItemSigmas(prior, read_schedule(FAST), estimated_map(noise_of(MEASURED)))
        sigma = sigmas.of_volume(scan, MEASURED)
        sigma_map = cut(sigmas.map_of(Whole(scan), VARYING), slices, crop)
        y = cut(scan.read_all(), slices, crop)
        return cls(y, sigma, np.stack([head_mask(piece[None]) for piece in y]), sigma_map)

    def sigma_of(self, name: str) -> float | Volume:
        """What a method takes for σ."""
        return self.sigma if self.sigma_map is None or name != MAPPED else self.sigma_map

    def result(self, name: str) -> Volume:
        if name not in self.restored:
            self.restored[name] = self.restoring[name]()
        return self.restored[name]

    def figures(self, name: str) -> dict[str, float | str]:
        """A row of the table."""
        start = time.process_time()
        x = self.result(name)
        seconds = time.process_time() - start
        sigma = self.sigma_of(name)
        level = float(np.sqrt(np.mean(np.broadcast_to(sigma, x.shape)[self.head] ** 2)))
        return {"sigma_percent": 50 * level, **self.judged(x, sigma), "seconds": seconds}

    def judged(self, x: Volume, sigma: float | Volume) -> dict[str, float | str]:
        """What is known of a result without the truth."""
        residual = (self.y - x) / sigma
        change = gaussian_gradient_magnitude(self.y, SMOOTH)
        edge = self.head & (change > np.quantile(change[self.head], 1 - EDGES))
        rms = [
            float(np.sqrt(np.mean(residual[where].astype(np.float64) ** 2)))
            for where in (self.head, edge, self.head & ~edge)
        ]
        return {
            "removed": rms[0],
            "edges": rms[1] / rms[2],
            "in_plane": float(rings(autocorrelation(residual, self.head)).max()),
            "across": across_slices(residual, self.head),
        }

    def shown(self) -> list[Shown]:
        """Of each method its name, the middle slice, and what was taken out of it in σ."""
        middle, y = len(self.y) // 2, self.y
        found = []
        for name in self.restoring:
            sigma = np.broadcast_to(self.sigma_of(name), y.shape)[middle]
            x = self.result(name)[middle]
            found.append((name, x, (y[middle] - x) / sigma))
        return found


def draw(path: str, scans: Mapping[str, Sequence[Shown]]) -> None:
    """For each scan a row of restored slices, and below it what was taken out, from -3 to 3 σ."""
    widest = max(len(shown) for shown in scans.values())
    figure = Figure(figsize=(2 * widest, 4.5 * len(scans)), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2 * len(scans), widest, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (scan, shown) in enumerate(scans.items()):
        for j, (name, x, residual) in enumerate(shown):
            axes[2 * i, j].imshow(x, cmap="gray", vmin=-1, vmax=1)
            title = f"{scan}, {name}" if j == 0 else name
            axes[2 * i, j].set_title(title, fontsize=8, parse_math=False)
            if j:
                axes[2 * i + 1, j].imshow(residual, cmap="gray", vmin=-3, vmax=3)
    canvas.draw()
    write_png(path, np.asarray(canvas.buffer_rgba())[..., 0])  # all of it is grey


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.scans:
        print("error: --scans: expected NIfTI files or folders of a DICOM series", file=sys.stderr)
        return 2
    prior = load_prior(args.model_config, "cpu")
    rows = Rows(args.out, COLUMNS, KEY, prior.digest[:12])
    pictures: dict[str, Callable[[], list[Shown]]] = {}
    anew = not os.path.exists(args.figure)
    for path in args.scans:
        scan = list_items({"root": path, "measured": True}, magnitude=True)[0].volume
        case = Case.of(scan, prior, args.slices, args.crop)
        case.restoring |= methods(prior, case.y, case.sigma, way_of(scan))
        if not way_of(scan).in_turn:  # main.py's volume is its slices
            del case.restoring["ours, volume"]
        case.restoring[MAPPED] = partial(ours, prior, case.y, case.sigma_of(MAPPED), way_of(scan))
        for name in list(case.restoring)[1:]:
            key = {"scan": scan.name, "shape": "×".join(map(str, case.y.shape)), "method": name}
            rows.measure(key, partial(case.figures, name))
        anew = anew or bool(case.restored)
        pictures[scan.name] = case.shown
    if anew:
        draw(args.figure, {name: shown() for name, shown in pictures.items()})
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
