"""A folder to train in, and what training leaves there."""

import csv

import torch

from guided_diffusion.train import main
from tests.conftest import LINEAR, TINY, write_training_images, write_yaml

CONFIG = {
    "model_config": "model.yaml",
    "diffusion_config": "diffusion.yaml",
    "crop_size": 16,
    "batch_size": 4,
    "augment": 0.5,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "log_steps": 1,
    "val_images": 2,
    "val_timesteps": [100, 500],
}


def prepare():
    """Seven images and configs, in the working directory."""
    write_training_images()
    write_yaml("model.yaml", {**TINY, "model_path": "unused.pt"})
    write_yaml("diffusion.yaml", LINEAR)
    write_yaml("train.yaml", CONFIG)


def train(out, *arguments):
    command = ["--config", "train.yaml", "--data_dir", "train", "--val_dir", "train"]
    return main([*command, "--out", out, *arguments])


def rows(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(path):
    return torch.load(path, weights_only=True)["model"]
