"""The prior: a network with its weights, where it runs and in which precision."""

from dataclasses import dataclass, replace

import torch

from guided_diffusion.checkpoints import checkpoint_digest
from guided_diffusion.config import ModelConfig, read_model_config
from guided_diffusion.devices import compile_network, pick_device, pick_dtype, reuse_memory
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics, load_statistics
from guided_diffusion.unet import UNetModel, create_model
from util.errors import UserError

SHIPPED = "configs/model_config_mri.yaml"


@dataclass(frozen=True, eq=False)
class Prior:
    """A network that is ready to restore with.

    Attributes:
        digest: SHA-256 of the checkpoint file; "" for an untrained network.
        dtype: of the network's torso; what goes in and comes out is float32.
        statistics: of the images that it was trained on; `NATURAL_IMAGES` where none lie beside
            the weights.
    """

    network: UNetModel
    config: ModelConfig
    digest: str
    device: torch.device
    dtype: torch.dtype
    statistics: PriorStatistics

    @property
    def channels(self) -> int:
        return self.config.in_channels

    @property
    def image_size(self) -> int:
        """The side of the images that it was trained on; it takes others."""
        return self.config.image_size


def load_prior(
    model_config: str | ModelConfig = SHIPPED,
    device: str | torch.device | None = None,
    precision: str = "auto",
    compile: bool = False,
) -> Prior:
    """Load a network for restoring.

    Args:
        model_config: path of a model YAML, or what it holds.
        device: "cpu", "cuda", "cuda:1"; None is GPU 0 if there is one, else the CPU.
        precision: "fp32", "bf16" or "fp16" of the torso; "auto" takes what the hardware is fast at.
        compile: whether to torch.compile the network: minutes at the start; some machines are
            faster after it.

    Raises:
        UserError: the config or the checkpoint cannot be read or do not fit each other, the
            network needs class labels, or it cannot be compiled here.
    """
    where = "model config"
    if isinstance(model_config, str):
        where, model_config = model_config, read_model_config(model_config)
    if model_config.class_cond:
        raise UserError(f"{where}: class_cond: true, and this program gives no class labels")
    device = pick_device(0) if device is None else torch.device(device)
    dtype = pick_dtype(precision, device, model_config.use_fp16)
    if device.type == "cpu":
        reuse_memory()
    network = create_model(**vars(replace(model_config, use_fp16=False)))
    network.to(device).to(memory_format=torch.channels_last).set_torso_dtype(dtype)
    network.requires_grad_(False)
    if compile:
        compile_network(network, device)
    path = model_config.model_path
    statistics = load_statistics(path) or NATURAL_IMAGES
    return Prior(network, model_config, checkpoint_digest(path), device, dtype, statistics)
