"""Checkpoint files: read without running code from them, loaded strictly, written whole."""

import hashlib
import pickle
import warnings
import zipfile
from typing import Any

import torch
from torch import nn

from util.errors import UserError
from util.files import replacing
from util.remote import base_name, kept_file

WHERE_TO_GET = {
    "256x256_diffusion_uncond.pt": "download it from github.com/openai/guided-diffusion",
    "ffhq_10m.pt": "download it from the links of github.com/DPS2022/diffusion-posterior-sampling",
    "model080000.pt": "it is the published program's own, ask its authors; models/mri.pt ships",
    "mri.pt": "it ships in this repository's models/",
}


def load_weights_only(path: str, key: str) -> Any:
    """torch.load onto the CPU without running code from the file.

    Raises:
        UserError: the file, named by `key`, is truncated, damaged or holds code.
    """
    try:
        with open(kept_file(path), "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what matters is raised
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch raises the same type for code and for bytes that are no pickle at all.
        if "Unsupported global" in str(error):
            raise UserError(
                f"{key}: {path} holds pickled code besides weights and was not loaded; "
                "save its state_dict alone"
            ) from None
        raise UserError(f"{key}: {path} is not a PyTorch checkpoint") from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, LookupError, ValueError):
        raise UserError(
            f"{key}: {path} is truncated or damaged, no PyTorch checkpoint can be read from it"
        ) from None


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """Read a state dict without running code from it.

    Args:
        path: a local or remote path.

    Returns:
        dict of parameter name → CPU tensor; a wrapper's ``module.`` prefix is removed.

    Raises:
        UserError: the file is missing, out of reach, truncated, holds code, or is no state dict.
    """
    try:
        kept_file(path)
    except FileNotFoundError:
        hint = WHERE_TO_GET.get(
            base_name(path), "models/README.md names the checkpoints this program takes"
        )
        raise UserError(f"model_path: no checkpoint at {path} ({hint})") from None
    except OSError as error:
        raise UserError(f"model_path: {path} cannot be read ({error.strerror})") from None
    state = load_weights_only(path, "model_path")
    if not isinstance(state, dict):
        raise UserError(f"model_path: {path} holds a {type(state).__name__}, expected a state dict")
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel counts its updates here
    while state and all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    if not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"model_path: {path} holds more than weights, expected a bare state dict")
    return state


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Load a checkpoint into `model`, strictly.

    Raises:
        UserError: see `read_checkpoint`; names or shapes differ from the model's, or a weight is
            not finite.
    """
    state = read_checkpoint(path)
    expected = model.state_dict()
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    reshaped = [
        f"{k} {tuple(state[k].shape)} in the file, {tuple(v.shape)} in the model"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = []
    for what, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of other shape", reshaped),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{what}: {', '.join(keys[:3])}{more}")
    if problems:
        raise UserError(
            f"model_path: {path} is not a checkpoint of the architecture in the model config "
            f"({'; '.join(problems)})"
        )
    broken = [k for k, v in state.items() if not torch.isfinite(v).all()]
    if broken:
        raise UserError(
            f"model_path: {path} holds weights that are not finite, in {broken[0]} (a training "
            "that diverged?), expected numbers"
        )
    model.load_state_dict(state)


def checkpoint_digest(path: str) -> str:
    """SHA-256 of a checkpoint file, in hexadecimal; "" for no path."""
    if not path:
        return ""
    digest = hashlib.sha256()
    with open(kept_file(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_checkpoint(model: nn.Module, path: str) -> None:
    """Write a model's weights alone, as float16."""
    with replacing(path) as temporary:
        torch.save({k: v.cpu().half() for k, v in model.state_dict().items()}, temporary)
