"""The crops that training is of."""


import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data.crops import TrainingCrops, change_contrast
from tests.conftest import write_training_images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven images in train/; cwd is there."""
    monkeypatch.chdir(tmp_path)
    write_training_images()


def test_crops_are_decided_by_their_index_and_cover_every_file(folder):
    crops = TrainingCrops(
        [[f"train/{i}.png" for i in range(7)]],
        shares=[1.0],
        channels=1,
        probabilities=np.full(1000, 1e-3),
        crop_size=24,
        flip=False,
        augment=0.0,
        seed=3,
    )
    first, again = crops[5], crops[5]
    pairs = zip(first, again, strict=True)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
    assert first[0].shape == (1, 24, 24) and 0 <= first[1] < 1000
    files = [iio.imread(f"train/{i}.png") for i in range(7)]

    def which(crop):
        pixels = np.rint((crop[0].numpy() + 1) * 127.5)
        matches = [any((f[:, c : c + 24] == pixels).all() for c in range(9)) for f in files]
        return matches.index(True)

    epochs = [[which(crops[7 * e + i][0]) for i in range(7)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]


def test_contrast_changes_stay_in_range_and_keep_air_black():
    image = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 16, 16)
    means = []
    for seed in range(50):
        changed = change_contrast(image, np.random.default_rng(seed))
        assert changed.dtype == np.float32 and changed.shape == image.shape
        assert changed.min() >= -1 and changed.max() <= 1
        assert changed[0, 0, 0] == -1
        means.append(changed.mean())
    assert np.std(means) > 0.1


def test_timesteps_are_drawn_with_their_probabilities(folder):
    def drawn(probabilities):
        crops = TrainingCrops([["train/0.png"]], [1.0], 1, probabilities, 8, False, 0.0, seed=1)
        return np.bincount([crops[n][1] for n in range(400)], minlength=3) / 400

    assert drawn([0.2, 0.0, 0.8]) == pytest.approx([0.2, 0, 0.8], abs=0.06)
