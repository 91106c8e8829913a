"""Random numbers that belong to an image, not to a run.

A reconstruction's numbers are decided by the image's name, the sample's index and the run's
seed, so batch size, neighbours in the folder, ranks and resumption change nothing.
"""

import hashlib
import math
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

KNOT_MM = 20.0  # between the knots of a volume's noise, see `knots`
Mixture = Sequence[tuple[int, float]]


def image_generator(name: str, sample: int | str, seed: int) -> torch.Generator:
    """CPU generator of one image's sample; `sample` is an index, or "measurement"."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Place(NamedTuple):
    """Where a slice lies, on which its noise depends: in this volume, so many millimetres along."""

    volume: str
    mm: float


def sample_random(
    names: Sequence[str],
    samples: Iterable[int],
    seed: int,
    places: Sequence[Place | None] | None = None,
) -> "ImageRandom":
    """The random numbers of these samples of every image, image by image.

    An odd sample mirrors the even one before it: it draws the same numbers with the other sign
    (antithetic variates, Hammersley & Morton 1956). Each of the two is as normal as the other, and
    what a sampler makes of the noise cancels in their mean, as far as it is linear.

    Args:
        names: of the images.
        samples: indices.
        places: of images that are slices, whose noise is to agree with their neighbours', see
            `knots`; None for an image whose noise is its own.

    Returns:
        `ImageRandom` of len(names)·len(samples) rows.
    """
    keys: dict[tuple[str, int], int] = {}
    rows: list[Mixture] = []
    for name, place in zip(names, places or [None] * len(names), strict=True):
        parts = [(name, 1.0)] if place is None else knots(place)
        for k in samples:
            sign = -1 if k % 2 else 1
            pairs = [((part, k - k % 2), sign * weight) for part, weight in parts]
            rows.append([(keys.setdefault(key, len(keys)), weight) for key, weight in pairs])
    return ImageRandom([image_generator(name, k, seed) for name, k in keys], rows)


def knots(place: Place) -> list[tuple[str, float]]:
    """Names and weights of the noise at the knots beside a slice, of which its own consists.

    Knots lie every KNOT_MM along the volume, each with noise of its own. Between two of them, z
    and z', a slice has ε = cos(aπ/2) z + sin(aπ/2) z', a from 0 to 1 (ISCS, ICLR 2026): the
    spherical interpolation of two noises at the right angle that independent ones have but for
    O(1/√pixels). The squares of the weights sum to 1, so ε ~ N(0, I); slices less than a knot
    apart agree, and those two knots apart share nothing.
    """
    before, part = divmod(place.mm / KNOT_MM, 1.0)
    names = (f"{place.volume}\0knot {int(before) + i}" for i in (0, 1))
    weights = math.cos(part * math.pi / 2), math.sin(part * math.pi / 2)
    return [(name, w) for name, w in zip(names, weights, strict=True) if w > 0]


class ImageRandom:
    """Random tensors for a batch; each image's rows come from its own generator, or a mixture.

    A tensor of more rows than there are images holds that many rows for each image: the
    contrasts of a composite that are restored side by side.

    A sampler draws noise of one shape at every step. So after each draw a thread begins the next
    of that shape, while the network works; the numbers are those that would be drawn without it.

    Args:
        generators: of normal noise.
        mixtures: for each image the (index of the generator, weight) of which its normal noise is
            the sum; by default each has one generator.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        mixtures: Sequence[Mixture] | None = None,
    ):
        self.generators = list(generators)
        self.mixtures = mixtures or [[(i, 1)] for i in range(len(self.generators))]
        self._ahead: _Ahead | None = None

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of x's shape, dtype float32, on x's device."""
        shape = torch.Size((len(x) // len(self.mixtures), *x.shape[1:]))
        noise = self._take_ahead(shape)
        if noise is None:
            noise = self._draw(shape)
        self._ahead = _Ahead(self, shape)
        return noise.to(x.device, non_blocking=True)

    def poisson(self, rate: torch.Tensor) -> torch.Tensor:
        """Poisson counts of the given rates, of their shape and device."""
        self._take_ahead(None)
        parts = rate.cpu().chunk(len(self.generators))
        rows = [torch.poisson(p, generator=g) for p, g in zip(parts, self.generators, strict=True)]
        return torch.cat(rows).to(rate.device)

    def _draw(self, shape: torch.Size) -> torch.Tensor:
        """Normal noise, `shape` for each image one after the other."""
        drawn = [torch.randn(shape, generator=g) for g in self.generators]
        rows = []
        for (first, weight), *others in self.mixtures:
            row = weight * drawn[first]
            for i, weight in others:
                row = row.add_(drawn[i], alpha=weight)
            rows.append(row)
        return torch.cat(rows)

    def _take_ahead(self, shape: torch.Size | None) -> torch.Tensor | None:
        """What was drawn ahead, if of this shape; otherwise as if nothing had been."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        ahead.thread.join()
        if ahead.shape == shape and ahead.noise is not None:
            return ahead.noise
        for generator, state in zip(self.generators, ahead.states, strict=True):
            generator.set_state(state)
        return None


class _Ahead:
    """One draw in a thread of its own, and the generators' states before it."""

    def __init__(self, random: ImageRandom, shape: torch.Size):
        self.shape = shape
        self.states = [g.get_state() for g in random.generators]
        self.noise: torch.Tensor | None = None
        self.thread = threading.Thread(target=self._draw, args=(random,))
        self.thread.start()

    def _draw(self, random: ImageRandom) -> None:
        self.noise = random._draw(self.shape)
