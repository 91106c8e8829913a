"""Where the network runs: device, precision, compilation."""

import ctypes
import platform
import sys

import torch
from torch import nn

from guided_diffusion.launch import local_rank, processes_started
from util.errors import UserError


def native_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # x86 alone can be asked; without these instructions bf16 is slower than float32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(hasattr(torch.cpu, check) and getattr(torch.cpu, check)() for check in checks)


def pick_device(gpu: int) -> torch.device:
    """The device that --gpu asks for: an index, or -1 for the CPU; GPU 0 falls back to the CPU.

    Processes that torchrun or mpiexec started take one GPU each, in turn, from that index on.

    Raises:
        UserError: there is no such GPU.
    """
    count = torch.cuda.device_count()
    if gpu != -1 and count and processes_started() > 1:
        gpu = (gpu + local_rank()) % count
    if gpu == -1 or (gpu == 0 and count == 0):
        return torch.device("cpu")
    if not 0 <= gpu < count:
        have = f"GPUs 0 to {count - 1}" if count else "none, and -1 for the CPU"
        raise UserError(f"--gpu: there is no GPU {gpu} on this machine (it has {have})")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def pick_dtype(
    precision: str, device: torch.device, use_fp16: bool = False
) -> torch.dtype:
    """The torso's dtype for --precision; auto takes what the hardware is fast at.

    `use_fp16` is the model config's: with auto it stands on a GPU.
    """
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return names[precision]
    if use_fp16 and device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if native_bf16(device) else torch.float32


def reuse_memory() -> bool:
    """Let the process keep memory that a network's layers free, for the next ones.

    By itself glibc returns blocks of some MB to the system at once, which then has to clear them
    page by page for the next layer: a tenth of an evaluation on a CPU. Blocks above 32 MB, whole
    volumes among them, are still returned. Elsewhere than on glibc nothing is changed.

    Returns:
        whether it was done.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mmap_threshold, trim_threshold = -3, -1  # of mallopt(3)
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 512 << 20))


def compile_network(model: nn.Module, device: torch.device, key: str = "--compile") -> None:
    """torch.compile the network in place; the first evaluation then takes minutes.

    The first shape of a batch is compiled for itself, for speed. From the second on, the sizes
    that changed are left open, so that a folder of many sizes compiles a few times, not each time.
    Evaluations under autograd (dps, pigdm) are compiled apart.

    Args:
        key: the flag or key that asks for it, for error messages.

    Raises:
        UserError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # noqa: BLE001 - no compiler, no Triton, new Python, nameless user
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(f"{key}: torch.compile does not work here ({reason})") from None
    model.compile()
