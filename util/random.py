"""Random numbers that belong to an image, not to a run.

A reconstruction's numbers are decided by the image's name, the sample's index and the run's
seed, so batch size, neighbours in the folder, ranks and resumption change nothing.
"""

import hashlib
import threading
from collections.abc import Iterable, Sequence

import torch


def image_generator(name: str, sample: int | str, seed: int) -> torch.Generator:
    """CPU generator of one image's sample; `sample` is an index, or "measurement"."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_random(names: Sequence[str], samples: Iterable[int], seed: int) -> "ImageRandom":
    """The random numbers of these samples of every image, image by image.

    An odd sample mirrors the even one before it: it draws the same numbers with the other sign
    (antithetic variates, Hammersley & Morton 1956). Each of the two is as normal as the other, and
    what a sampler makes of the noise cancels in their mean, as far as it is linear.

    Args:
        names: of the images.
        samples: indices.

    Returns:
        `ImageRandom` of len(names)·len(samples) generators.
    """
    pairs = [(name, k) for name in names for k in samples]
    generators = [image_generator(name, k - k % 2, seed) for name, k in pairs]
    return ImageRandom(generators, mirrored=[k % 2 == 1 for _, k in pairs])


class ImageRandom:
    """Random tensors for a batch; each image's rows come from its own generator.

    A tensor of more rows than there are generators holds that many rows for each image: the
    contrasts of a composite that are restored side by side.

    A sampler draws noise of one shape at every step. So after each draw a thread begins the next
    of that shape, while the network works; the numbers are those that would be drawn without it.

    Args:
        mirrored: for each generator whether its normal numbers change their sign; by default none.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], mirrored: Sequence[bool] | None = None
    ):
        self.generators = list(generators)
        self.signs = [-1 if m else 1 for m in mirrored or [False] * len(self.generators)]
        self._ahead: _Ahead | None = None

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of x's shape, dtype float32, on x's device."""
        shape = torch.Size((len(x) // len(self.generators), *x.shape[1:]))
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
        """Normal noise, `shape` for each generator one after the other."""
        drawn = zip(self.generators, self.signs, strict=True)
        return torch.cat([sign * torch.randn(shape, generator=g) for g, sign in drawn])

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
