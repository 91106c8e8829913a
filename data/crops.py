"""Training data: random crops of a folder of images, decided by their index alone."""

import os

import numpy as np
import torch
from torch.utils.data import Dataset

from data.dataloader import read_image
from util.errors import UserError


class TrainingCrops(Dataset):
    """An endless, shuffled stream of augmented crops; item n is always the same for one seed.

    Items are (x_0, t, noise): (C, crop, crop) float32 in [-1, 1], the timestep to train it at,
    drawn with the given `probabilities`, and the noise to add. Because n alone decides them,
    training resumes exactly where it stopped, and several processes draw together what one would.
    """

    def __init__(self, paths, channels, probabilities, crop_size, flip, augment, seed):
        self.probabilities = probabilities
        self.paths = paths
        self.channels = channels
        self.crop_size = crop_size
        self.flip = flip
        self.augment = augment
        self.seed = seed

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.paths))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.paths))
        rng = np.random.default_rng([self.seed, 1, n])
        image = to_channels(read_image(self.paths[order[position]]), self.channels)
        image = random_crop(image, self.crop_size, rng, self.paths[order[position]])
        if self.flip and rng.random() < 0.5:
            image = image[..., ::-1]
        if rng.random() < self.augment:
            image = change_contrast(image, rng)
        t = rng.choice(len(self.probabilities), p=self.probabilities)
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(image)), t, torch.from_numpy(noise)


def to_channels(image, channels):
    """A grey image repeated, or a colour image averaged, to the channels of the prior."""
    if image.shape[0] == channels:
        return image
    if channels == 1:
        return image.mean(axis=0, keepdims=True)
    return np.repeat(image[:1], channels, axis=0)


def random_crop(image, size, rng, path):
    height, width = image.shape[1:]
    if height < size or width < size:
        raise UserError(
            f"{os.path.basename(path)}: {width}×{height} is smaller than crop_size {size}"
        )
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return image[:, top : top + size, left : left + size]


def change_contrast(image, rng):
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
