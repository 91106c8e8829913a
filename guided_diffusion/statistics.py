"""What is known of a prior's images besides the network: their power spectrum and mean.

    python -m guided_diffusion.statistics --data_dir TRAIN --out models/mine.json

measures them on the images that the prior was trained on. They are kept beside its weights, under
the same name, and loaded with them.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.fft
import torch
from tqdm import tqdm

from data.dataloader import list_items
from data.items import Item
from data.sources import find_shares, sources_of
from util import terminal
from util.errors import ArgumentParser, UserError
from util.files import replacing_text
from util.flags import local_path
from util.remote import local_file

REFERENCE = 256  # pixels; frequencies are counted in half cycles in so many
# Edges of the frequency bands, octaves. The first holds the lowest frequencies together, for of an
# image that is symmetric, like a head, those that are odd vanish.
BANDS = np.append(0.5, 2.05 * 2.0 ** np.arange(9))
RIM = 1 / 32  # of each side: an image's outermost rows and columns


@dataclass(frozen=True)
class PriorStatistics:
    """Second-order statistics of the images that a prior was trained on, in [-1, 1].

    Attributes:
        mean_intensity: of all pixels.
        frequencies: spatial frequencies, ascending, in half cycles per 256 pixels, the index of a
            DCT coefficient of an image of that side.
        powers: mean squared coefficient of the orthonormal two-dimensional DCT-II at each, without
            the constant; between them a power law is taken.
        source: what they were measured on, for people.
        rim: mean intensity at `rim_of`, its median over images and half the width of its middle
            68 %, which is a Gaussian's standard deviation; None where it was not measured.
        mean_power: variance over images of their mean times √(HW), the constant's coefficient;
            None where it was not measured.
    """

    mean_intensity: float
    frequencies: tuple[float, ...]
    powers: tuple[float, ...]
    source: str
    rim: tuple[float, float] | None = None
    mean_power: float | None = None

    @classmethod
    def load(cls, path: str) -> "PriorStatistics":
        """Read what `save` wrote, from a local or remote path.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be read, or holds no statistics.
        """
        try:
            with local_file(path) as local, open(local, encoding="utf-8") as file:
                found = json.load(file)
            statistics = cls(
                float(found["mean_intensity"]),
                tuple(float(f) for f in found["frequencies"]),
                tuple(float(p) for p in found["powers"]),
                str(found["source"]),
                None if found.get("rim") is None else _pair(found["rim"]),
                None if found.get("mean_power") is None else float(found["mean_power"]),
            )
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UserError(
                f"{path}: expected statistics of a prior's images, as "
                "`python -m guided_diffusion.statistics` writes them"
            ) from None
        frequencies, powers = np.array(statistics.frequencies), np.array(statistics.powers)
        if not (np.isfinite(powers).all() and np.isfinite(frequencies).all()):
            raise UserError(f"{path}: expected finite frequencies and powers")
        mean, rim = statistics.mean_intensity, statistics.rim
        if not (-1 <= mean <= 1 and (rim is None or -1 <= rim[0] <= 1 and rim[1] >= 0)):
            raise UserError(
                f"{path}: expected mean_intensity and rim within [-1, 1], found {mean:g}"
                + ("" if rim is None else f" and {list(rim)}")
            )
        power = statistics.mean_power
        if power is not None and not 0 < power < np.inf:
            raise UserError(f"{path}: expected a positive mean_power, found {power:g}")
        ascending = len(frequencies) > 0 and frequencies[0] > 0 and (np.diff(frequencies) > 0).all()
        if not (ascending and len(powers) == len(frequencies) and (powers > 0).all()):
            raise UserError(
                f"{path}: expected ascending positive frequencies, and a positive power for each"
            )
        return statistics

    def save(self, path: str) -> None:
        """Write the statistics as JSON; what was not measured is left out."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        with replacing_text(path) as file:
            json.dump(found, file, indent=2)
            file.write("\n")

    def power_spectrum(self, height: int, width: int) -> torch.Tensor:
        """Prior variance of each DCT coefficient of an image, (height, width) float64.

        The constant has that of the lowest frequencies.
        """
        rows, cols = REFERENCE / height * np.arange(height), REFERENCE / width * np.arange(width)
        radius = np.hypot(rows[:, None], cols)
        log_power = np.interp(
            np.log(np.maximum(radius, 1)), np.log(self.frequencies), np.log(self.powers)
        )
        return torch.from_numpy(np.exp(log_power))

    @classmethod
    def measure(cls, images: Iterable[tuple[float, np.ndarray]], source: str) -> "PriorStatistics":
        """Measure them on images.

        Args:
            images: (weight, image), each (C, H, W) in [-1, 1]; sizes may differ.
            source: see the attribute.

        Raises:
            UserError: the images are constant, or there is none.
        """
        pixels = total = 0.0
        means: list[tuple[float, float, float]] = []  # mean, HW, weight
        bands = np.zeros((3, len(BANDS) - 1))  # coefficients, their logarithmic radii, their power
        rims: list[tuple[float, float]] = []  # mean, weight
        for weight, image in images:
            at_rim = image[:, rim_of(*image.shape[1:])]
            rims.append((float(at_rim.mean(dtype=np.float64)), weight))
            total += weight * float(image.sum(dtype=np.float64))
            pixels += weight * image.size
            means.append((float(image.mean(dtype=np.float64)), float(image[0].size), weight))
            bands += weight * bands_of(image)
        counts, radii, powers = bands[:, bands[2] > 0]
        if not len(counts):
            raise UserError(f"{source}: no image that could be measured, or all are constant")
        levels, areas, weights = np.array(means).T
        mean_power = float(np.average(areas * (levels - total / pixels) ** 2, weights=weights))
        low, middle, high = _quantiles(rims, (0.16, 0.5, 0.84))
        return cls(
            round(total / pixels, 4),
            tuple(float(f"{f:.4g}") for f in np.exp(radii / counts)),
            tuple(float(f"{p:.4g}") for p in powers / counts),
            source,
            (round(middle, 4), round((high - low) / 2, 4)),
            float(f"{mean_power:.4g}") or None,  # of one image it is not known
        )


# Where nothing was measured: the law of natural images, power ~ 1/f² (Field, "Relations between the
# statistics of natural images and the response properties of cortical cells", 1987). Mean and scale
# are those of scikit-image's photographs (astronaut, camera, chelsea, coffee, rocket), in which
# `measure` finds a power from 3000/f² at f = 1.3 to 800/f² at f = 25.
NATURAL_IMAGES = PriorStatistics(-0.2, (1.0, 400.0), (1500.0, 1500.0 / 400.0**2), "natural images")


def bands_of(image: np.ndarray, power: np.ndarray | None = None) -> np.ndarray:
    """(3, bands): of each of `BANDS` the number of DCT coefficients, and sums over them.

    Args:
        image: (C, H, W).
        power: (H, W) of its coefficients, in place of the image's own, the mean over channels.

    Returns:
        the numbers, the sums of the logarithms of their radii, and those of their power.
    """
    height, width = image.shape[1:]
    radius = np.hypot(
        REFERENCE / height * np.arange(height)[:, None],
        REFERENCE / width * np.arange(width),
    )
    if power is None:
        power = np.zeros((height, width))
        for channel in image:  # one by one: the channels of a volume are many
            power += scipy.fft.dctn(channel.astype(np.float64), norm="ortho") ** 2 / len(image)
    band = np.digitize(radius, BANDS) - 1
    valid = (band >= 0) & (band < len(BANDS) - 1)  # not the constant
    rows = (np.ones_like(radius), np.log(np.maximum(radius, 1e-9)), power)
    return np.stack([np.bincount(band[valid], row[valid], len(BANDS) - 1) for row in rows])


def _quantiles(weighted: Sequence[tuple[float, float]], at: Sequence[float]) -> list[float]:
    """The least values that have at least so much of the weight up to them; of (value, weight)."""
    values, weights = np.array(sorted(weighted)).T
    share = weights.cumsum() / weights.sum()
    return [float(values[min(np.searchsorted(share, q), len(values) - 1)]) for q in at]


def rim_of(height: int, width: int) -> np.ndarray:
    """(height, width), True at the outermost `RIM` of each side."""
    rows, cols = (max(1, round(RIM * side)) for side in (height, width))
    outer = np.ones((height, width), bool)
    outer[rows : height - rows, cols : width - cols] = False
    return outer


def statistics_path(model_path: str) -> str:
    """Where the statistics of a checkpoint's images lie: beside it, ending in .json."""
    return os.path.splitext(model_path)[0] + ".json"


def load_statistics(model_path: str) -> PriorStatistics | None:
    """The statistics that lie beside a checkpoint; None if there are none.

    Args:
        model_path: local or remote; "" for an untrained network.

    Raises:
        UserError: see `PriorStatistics.load`.
    """
    if not model_path:
        return None
    try:
        return PriorStatistics.load(statistics_path(model_path))
    except FileNotFoundError:
        return None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure the power spectrum and the mean of a prior's training images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data_dir",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="folders of pictures or volumes, or files, each a source of its own, named after the "
        "folder or NAME=FOLDER; one that holds only folders stands for these. Sources weigh as in "
        "training: by the square root of their sizes, unless --shares says another",
    )
    parser.add_argument(
        "--shares",
        nargs="*",
        default=[],
        metavar="NAME=PART",
        help="shares of sources, from 0 to 1",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        help="the JSON file, beside the weights: models/mine.json",
    )
    parser.add_argument("--source", default=None, help="what they were measured on, for people")
    return parser.parse_args(argv)


def _pair(found: Sequence[float]) -> tuple[float, float]:
    mean, std = found
    return float(mean), float(std)


def _items(folders: Sequence[str]) -> dict[str, list[Item]]:
    """Source → its images."""
    sources: dict[str, list[Item]] = {}
    for folder in folders:
        for name, path in sources_of(folder):
            if name in sources:
                raise UserError(f"--data_dir: two sources are named {name!r}; name one of them, as "
                                f"in --data_dir other={path}")  # fmt: skip
            sources[name] = list(list_items({"root": path, "measured": False}))
    return sources


def _named_shares(texts: Sequence[str]) -> dict[str, float]:
    shares = {}
    for text in texts:
        name, _, part = text.partition("=")
        try:
            shares[name] = float(part)
        except ValueError:
            raise UserError(f"--shares: expected NAME=PART, found {text!r}") from None
    return shares


def _read(weighted: Sequence[tuple[str, float, Item]]) -> Iterator[tuple[float, np.ndarray]]:
    """(weight, image) of (source, weight, item); the first note of each source is printed."""
    told = set()
    for name, weight, item in tqdm(weighted, unit="image", dynamic_ncols=True):
        image = item.read()
        if item.note and name not in told:
            tqdm.write(f"note: --data_dir: {name}: {item.note}", file=sys.stderr)
            told.add(name)
        yield weight, image


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    terminal.prepare()
    args = parse_args(argv)
    try:
        if os.path.splitext(args.out)[1] != ".json":  # under which it would not be found again
            raise UserError(f"--out: expected a name that ends in .json, found {args.out}")
        sources = _items(args.data_dir)
        sizes = {name: len(items) for name, items in sources.items()}
        shares = find_shares(sizes, _named_shares(args.shares), "--shares")
        source = args.source or ", ".join(f"{n} images of {name}" for name, n in sizes.items())
        weighted = [
            (name, share / len(items), item)
            for share, (name, items) in zip(shares, sources.items(), strict=True)
            for item in items
        ]
        statistics = PriorStatistics.measure(_read(weighted), source)
        try:
            statistics.save(args.out)
        except OSError as error:
            raise UserError(f"--out: cannot write {args.out} ({error.strerror})") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: mean intensity {statistics.mean_intensity}, from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
