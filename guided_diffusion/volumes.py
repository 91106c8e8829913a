"""Volumes restored as a whole: an image whose channels are slices, and a network that sees them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from util.random import ImageRandom, Place, image_generator, sample_random

AXIAL, CORONAL, SAGITTAL = 2, 1, 0  # planes, by the world axis that they are stacked along
ISOTROPIC = 1.5  # of voxels, the most that their longest side has of the shortest, see `in_turn`


@dataclass(frozen=True)
class AsVolume:
    """How to restore images (N, D, H, W) whose channels are the D slices of a volume.

    Attributes:
        chunk: images that the network sees at once.
        spacing: mm between the slices given, for the noise that neighbours share; None gives each
            slice noise of its own, as it must be with planes in turn: seen from the side, noise
            that agrees is stripes, which the network takes for anatomy.
        in_turn: whether the network sees the volume along another of its axes at each step
            (TPDM, Lee et al. 2023): along D, along H, along W, ...; in fewer than three steps it
            sees all of them at each, and the mean of its answers counts.
        world: of the axes D, H and W, the world axis (0 right, 1 anterior, 2 superior) that each
            runs along, so that the network sees every plane upright.
        upward: whether D runs towards superior (anterior, right), and not away from it as H and W.
    """

    chunk: int = 8
    spacing: float | None = None
    in_turn: bool = False
    world: tuple[int, int, int] = (AXIAL, CORONAL, SAGITTAL)
    upward: bool = True

    def network(self, network: Callable, steps: int) -> "SliceNetwork":
        """The network as a sampler of so many steps sees it."""
        if not self.in_turn:
            return SliceNetwork(network, self, [[0]])
        return SliceNetwork(network, self, [[0], [1], [2]] if steps >= 3 else [[0, 1, 2]])

    def random(
        self, volumes: Sequence[str], slices: int, samples: range, seed: int, spacing: float | None
    ) -> "SliceRandom":
        """The numbers that a sampler draws: those of the slices, were they restored one by one.

        Args:
            volumes: names; samples: indices.
            slices: of a restored volume, `spacing` mm apart if that is not the spacing given.
        """
        names = [slice_name(v, i) for v in volumes for i in range(slices)]
        places: list[Place | None] = [None] * len(names)
        if self.spacing is not None:
            mm = spacing or self.spacing
            places = [Place(v, i * mm) for v in volumes for i in range(slices)]
        return SliceRandom(sample_random(names, samples, seed, places), len(samples))

    def measurement_random(self, volumes: Sequence[str], slices: int, seed: int) -> "SliceRandom":
        """The numbers of the noise of simulated measurements, which is each slice's own."""
        names = [slice_name(v, i) for v in volumes for i in range(slices)]
        each = [image_generator(name, "measurement", seed) for name in names]
        return SliceRandom(ImageRandom(each))


class SliceNetwork:
    """A network of one channel, given volumes instead of images.

    Args:
        turns: the axes that each call sees the volume along, call by call and over again; of
            several the mean counts.
    """

    def __init__(
        self,
        network: Callable,
        way: AsVolume,
        turns: Sequence[Sequence[int]],
    ):
        self.inner, self.way, self.turns = network, way, turns
        self.calls = 0

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) at timesteps (N,) → (N, D, H, W), or (N, 2D, H, W) with variances."""
        axes = self.turns[self.calls % len(self.turns)]
        self.calls += 1
        total = self._along(axes[0], x, timesteps)
        for axis in axes[1:]:
            total = total + self._along(axis, x, timesteps)
        return total / len(axes) if len(axes) > 1 else total

    def _along(self, axis: int, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        images, back = self._planes(x, axis)
        steps = timesteps.repeat_interleave(len(images) // len(x))
        chunks = zip(images.split(self.way.chunk), steps.split(self.way.chunk), strict=True)
        output = torch.cat([self._seen(part.contiguous(), t) for part, t in chunks])
        return torch.cat([back(output[:, i]) for i in range(output.shape[1])], dim=1)

    def _seen(self, images: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The network's output; where it is differentiated only the chunk in work is in memory."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self.inner(images, steps)
        return checkpoint(self.inner, images, steps, use_reentrant=False)

    def _planes(self, x: torch.Tensor, axis: int):
        """The images of a plane, (N·planes, 1, h, w), and the way back of (N·planes, h, w)."""
        flip = axis != 0 and self.way.upward
        rows, cols = sorted((i for i in range(3) if i != axis), key=lambda i: -self.way.world[i])
        if axis == 0:
            rows, cols = 1, 2
        order = (0, axis + 1, rows + 1, cols + 1)
        shown = (x.flip(1) if flip else x).permute(order)

        def back(images: torch.Tensor) -> torch.Tensor:
            volume = images.reshape(shown.shape).permute([order.index(i) for i in range(4)])
            return volume.flip(1) if flip else volume

        return shown.reshape(-1, 1, *shown.shape[2:]), back


class SliceRandom:
    """The random numbers of volumes (N·K, D, H, W), K samples of each.

    Args:
        of_slices: a row for each volume, slice and sample, in this order.
        samples: K.
    """

    def __init__(self, of_slices: ImageRandom, samples: int = 1):
        self.of_slices, self.samples = of_slices, samples

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        noise = self.of_slices.randn_like(x.flatten(0, 1)[:, None])
        by_slice = noise.reshape(-1, x.shape[1], self.samples, *x.shape[2:])
        return by_slice.transpose(1, 2).reshape(x.shape)

    def poisson(self, rate: torch.Tensor) -> torch.Tensor:
        """Of volumes without samples."""
        return self.of_slices.poisson(rate.flatten(0, 1)[:, None]).reshape(rate.shape)


def slice_name(volume: str, index: int) -> str:
    """Of a slice's results, and for its random numbers."""
    return f"{volume}_z{index:03d}"


def is_isotropic(*sides: float) -> bool:
    """Whether voxels of these sides in mm show anatomy from all sides as the network knows it."""
    return max(sides) <= ISOTROPIC * min(sides)
