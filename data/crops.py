"""Training data: random crops of images of several sources, decided by their index alone."""

import os

import numpy as np
import torch
from torch.utils.data import Dataset

from data.dataloader import read_image
from data.sources import Interleaving
from util.errors import UserError


class TrainingCrops(Dataset):
    """An endless, shuffled stream of augmented crops; item n is always the same for one seed.

    Items are (x_0, t, noise, source): (C, crop, crop) float32 in [-1, 1], the timestep to train
    it at, drawn with the given `probabilities`, the noise to add, and the index of its source.
    Because n alone decides them, a run that resumes draws what it would have drawn, and several
    processes draw together what one would. If max_steps is its budget, it ends with the weights of
    an uninterrupted run; if minutes are, the learning rate follows the clock. A source's images are
    all drawn once before any is drawn again.

    A flip is always left to right in the picture. In an axial or coronal slice it mirrors the
    head, which is nearly symmetric; in a sagittal one it turns the face to the other side, and
    scanners write both.

    Args:
        sources: the paths of each source's images.
        shares: the part of all items that each source gets, of sum 1.
    """

    def __init__(
        self,
        sources: list[list[str]],
        shares: list[float],
        channels: int,
        probabilities: np.ndarray,
        crop_size: int,
        flip: bool,
        augment: float,
        seed: int,
    ):
        self.sources = sources
        self.interleaving = Interleaving(shares, seed)
        self.probabilities = probabilities
        self.channels = channels
        self.crop_size = crop_size
        self.flip = flip
        self.augment = augment
        self.seed = seed

    def path(self, n: int) -> tuple[int, str]:
        """Item n's source and the file that it is cut from."""
        source, draw = self.interleaving[n]
        paths = self.sources[source]
        epoch, position = divmod(draw, len(paths))
        order = np.random.default_rng([self.seed, 0, epoch, source]).permutation(len(paths))
        return source, paths[order[position]]

    def __getitem__(self, n: int) -> tuple[torch.Tensor, int, torch.Tensor, int]:
        source, path = self.path(n)
        rng = np.random.default_rng([self.seed, 1, n])
        image = to_channels(read_image(path), self.channels)
        image = random_crop(image, self.crop_size, rng, path)
        if self.flip and rng.random() < 0.5:
            image = image[..., ::-1]
        if rng.random() < self.augment:
            image = change_contrast(image, rng)
        t = rng.choice(len(self.probabilities), p=self.probabilities)
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(image)), t, torch.from_numpy(noise), source


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """A grey image repeated, or a colour image averaged, to the channels of the prior."""
    if image.shape[0] == channels:
        return image
    if channels == 1:
        return image.mean(axis=0, keepdims=True)
    return np.repeat(image[:1], channels, axis=0)


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator, path: str) -> np.ndarray:
    height, width = image.shape[1:]
    if height < size or width < size:
        raise UserError(
            f"{os.path.basename(path)}: {width}×{height} is smaller than crop_size {size}"
        )
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return image[:, top : top + size, left : left + size]


def change_contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another plausible MR contrast: random gamma and gain, one time in four inverted.

    Inversion fades out towards 0, so that the air around the head stays black. One time in two
    a noise floor is taken off, as scanners and file converters do, which leaves air exactly black.
    """
    x = (image + 1) / 2
    if rng.random() < 0.25:
        x = np.clip(x / 0.1, 0, 1) * np.clip(rng.uniform(0.8, 1.1) - x, 0, 1)
    x = x ** np.exp(rng.normal(0, 0.35))
    x = np.clip(x * np.exp(rng.uniform(-0.4, 0.7)), 0, 1)
    if rng.random() < 0.5:
        x = np.clip(x - rng.uniform(0, 0.06), 0, 1)
    return (2 * x - 1).astype(np.float32)
