"""Checkpoint files: read without running code from them, loaded strictly, written whole."""

import pickle
import warnings
from typing import Any

import torch
from torch import nn

from util.errors import UserError
from util.files import file_digest, is_lfs_pointer, read_head, replacing
from util.remote import base_name, kept_file

WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
WHERE_TO_GET = {
    "256x256_diffusion_uncond.pt": "download it from github.com/openai/guided-diffusion",
    "ffhq_10m.pt": "download it from the links of github.com/DPS2022/diffusion-posterior-sampling",
    "model080000.pt": "it is the published program's own, ask its authors; models/mri.pt ships",
    "mri.pt": "it ships in this repository's models/",
}


def load_weights_only(path: str, key: str) -> Any:
    """torch.load onto the CPU without running code from the file.

    Raises:
        UserError: the file, named by `key`, is truncated, damaged, holds code or is none at all.
    """
    head = read_head(kept_file(path)).lstrip()
    if is_lfs_pointer(head):
        raise UserError(
            f"{key}: {path} is a Git LFS pointer, not the weights (git lfs pull fetches them)"
        )
    if head[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{key}: {path} is a web page, not the weights; download the file itself")
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
    except Exception:  # noqa: BLE001 - damaged files fail in many ways
        raise UserError(
            f"{key}: {path} is truncated or damaged, no PyTorch checkpoint can be read from it"
        ) from None


def read_checkpoint(path: str, key: str = "model_path") -> dict[str, torch.Tensor]:
    """Read a state dict without running code from it.

    Args:
        path: a local or remote path.
        key: what names it, for error messages.

    Returns:
        dict of parameter name → CPU tensor, without the prefixes of wrappers; a checkpoint that
        keeps its weights under ``state_dict`` gives these.

    Raises:
        UserError: the file is missing, out of reach, truncated, holds code, or is no state dict.
    """
    try:
        kept_file(path)
    except FileNotFoundError:
        hint = WHERE_TO_GET.get(
            base_name(path), "models/README.md names the checkpoints this program takes"
        )
        raise UserError(f"{key}: no checkpoint at {path} ({hint})") from None
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror})") from None
    state = load_weights_only(path, key)
    if not isinstance(state, dict):
        raise UserError(f"{key}: {path} holds a {type(state).__name__}, expected a state dict")
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    state = dict(state)
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel counts its updates here
    others = [str(k) for k, v in state.items() if not (isinstance(k, str) and torch.is_tensor(v))]
    if others:
        raise UserError(
            f"{key}: {path} holds more than weights ({', '.join(others[:3])}), expected a "
            "bare state dict"
        )
    return {_bare(k): v for k, v in state.items()}


def _bare(name: str) -> str:
    """A parameter's name without the prefixes of wrappers, wherever in it they stand."""
    parts = [f"{part}." for part in name.split(".")]
    return "".join(part for part in parts if part not in WRAPPERS)[:-1]


def load_checkpoint(model: nn.Module, path: str, key: str = "model_path") -> None:
    """Load a checkpoint, which `key` names, into `model`, strictly.

    Raises:
        UserError: see `read_checkpoint`; names or shapes differ from the model's, or a weight is
            not finite.
    """
    state = read_checkpoint(path, key)
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
            f"{key}: {path} is not a checkpoint of the architecture in the model config "
            f"({'; '.join(problems)})"
        )
    broken = [k for k, v in state.items() if not torch.isfinite(v).all()]
    if broken:
        raise UserError(
            f"{key}: {path} holds weights that are not finite, in {broken[0]} (a training "
            "that diverged?), expected numbers"
        )
    model.load_state_dict(state)


def checkpoint_digest(path: str) -> str:
    """SHA-256 of a checkpoint file, in hexadecimal; "" for no path."""
    if not path:
        return ""
    return file_digest(kept_file(path))


def save_tensors(contents: Any, path: str) -> None:
    """torch.save, of which nothing half-written is ever seen.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:
            # After a write that failed torch closes its archive, and complains of its length.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_checkpoint(model: nn.Module, path: str) -> None:
    """Write a model's weights alone, as float16."""
    save_tensors({k: v.cpu().half() for k, v in model.state_dict().items()}, path)
