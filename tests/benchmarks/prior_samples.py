"""Draw from the prior alone, and measure what comes: ``python tests/benchmarks/prior_samples.py``.

Sixteen samples by main.py, without choosing: laid out in models/samples.png, with the air at their
rims and their power spectrum in saved_results/benchmarks/training/. Then sixteen from the same
noise by plain DDPM, whose spectrum stands beside theirs. What this program does not know is passed
on to main.py, for instance ``--gpu -1``.
"""

import argparse
import csv
import os
import sys

import imageio.v3 as iio
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.prior import load_prior
from guided_diffusion.statistics import PriorStatistics
from tests.benchmarks import rows
from tests.benchmarks.figures import REPOSITORY, restore
from util.errors import status_of
from util.files import replacing, replacing_text

COUNT = 16
COLUMNS = 4  # of the picture
RIM = 8  # pixels
BAND = (4, 128)  # half cycles per 256 pixels: what the spectrum is compared in
DDPM = ("--set", "conditioning.params.epsilon_scale=1")


def read(folder):
    """The PNGs of a folder in order, (H, W) uint8 each."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".png"))
    return [iio.imread(os.path.join(folder, name)) for name in names]


def lay_out(tiles, path):
    """Write images of one size as a grid of COLUMNS."""
    lines = [np.hstack(tiles[i : i + COLUMNS]) for i in range(0, len(tiles), COLUMNS)]
    with replacing(path) as temporary:
        iio.imwrite(temporary, np.vstack(lines), extension=".png")


def air(tile):
    """Mean of the outermost RIM pixels, of a displayed range of 1."""
    inner = np.zeros(tile.shape, bool)
    inner[RIM:-RIM, RIM:-RIM] = True
    return float(tile[~inner].mean() / 255)


def spectrum(tiles, statistics):
    """(cycles per image, mean power divided by that of the training images), within BAND."""
    images = [(1, tile[None] / 127.5 - 1) for tile in tiles]
    found = PriorStatistics.measure(images, "samples")
    frequencies = np.array(found.frequencies)
    trained = np.exp(
        np.interp(np.log(frequencies), np.log(statistics.frequencies), np.log(statistics.powers))
    )
    ratios = np.array(found.powers) / trained
    seen = (frequencies >= BAND[0]) & (frequencies <= BAND[1])
    return [(f / 2, r) for f, r in zip(frequencies[seen], ratios[seen], strict=True)]


def write_csv(name, head, lines):
    with replacing_text(os.path.join(rows.FOLDER, "training", f"{name}.csv")) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([head, *lines])


def drawn(work_dir, *arguments):
    """The samples of main.py, see `read`."""
    restore("sample_config_mri", work_dir, "--limit", str(COUNT), *arguments)
    (folder,) = (f for f, _, _ in os.walk(work_dir) if os.path.basename(f) == "recon")
    return read(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", default=os.path.join(REPOSITORY, "results", "prior"))
    args, passed_on = parser.parse_known_args(argv)
    work_dir = os.path.abspath(args.work_dir)
    tiles = drawn(os.path.join(work_dir, "shipped"), *passed_on)
    lay_out(tiles, os.path.join(REPOSITORY, "models", "samples.png"))
    rims = [[i + 1, f"{air(tile):.3f}"] for i, tile in enumerate(tiles)]
    write_csv("samples_air", ["sample", "mean of its rim"], rims)
    plain = drawn(os.path.join(work_dir, "ddpm"), *passed_on, *DDPM)
    statistics = load_prior().statistics
    both = zip(spectrum(tiles, statistics), spectrum(plain, statistics), strict=True)
    ratios = [[f"{f:.1f}", f"{r:.2f}", f"{p:.2f}"] for (f, r), (_, p) in both]
    head = ["cycles per image", "power, of the training images'", "by plain DDPM"]
    write_csv("samples_spectrum", head, ratios)


if __name__ == "__main__":
    sys.exit(status_of(main))
