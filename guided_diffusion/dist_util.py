"""Ranks, devices and checkpoint files."""

import hashlib
import os
import pickle
import socket
import warnings
import zipfile

import torch
import torch.distributed as dist

from util.errors import UserError
from util.files import is_lfs_pointer, read_head, replacing
from util.remote import base_name, kept_file

WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
WHERE_TO_GET = {
    "256x256_diffusion_uncond.pt": "download it from github.com/openai/guided-diffusion",
    "ffhq_10m.pt": "download it from the links of github.com/DPS2022/diffusion-posterior-sampling",
    "model080000.pt": "it is the published program's own, ask its authors; models/mri.pt ships",
    "mri.pt": "it ships in this repository's models/",
}


def load_weights_only(path, key):
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
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, LookupError, ValueError):
        raise UserError(
            f"{key}: {path} is truncated or damaged, no PyTorch checkpoint can be read from it"
        ) from None


def read_checkpoint(path):
    """Read a state dict without running code from it.

    Args:
        path: a local or remote path.

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
        raise UserError(f"model_path: no checkpoint at {path} ({hint})") from None
    except OSError as error:
        raise UserError(f"model_path: {path} cannot be read ({error.strerror})") from None
    state = load_weights_only(path, "model_path")
    if not isinstance(state, dict):
        raise UserError(f"model_path: {path} holds a {type(state).__name__}, expected a state dict")
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    state = dict(state)
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel counts its updates here
    others = [str(k) for k, v in state.items() if not (isinstance(k, str) and torch.is_tensor(v))]
    if others:
        raise UserError(
            f"model_path: {path} holds more than weights ({', '.join(others[:3])}), expected a "
            "bare state dict"
        )
    return {_bare(k): v for k, v in state.items()}


def _bare(name):
    """A parameter's name without the prefixes of wrappers, wherever in it they stand."""
    parts = [f"{part}." for part in name.split(".")]
    return "".join(part for part in parts if part not in WRAPPERS)[:-1]


def load_checkpoint(model, path):
    """Load a checkpoint into `model`, strictly; raises UserError naming what differs."""
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
    model.load_state_dict(state)


def checkpoint_digest(path):
    """SHA-256 of a checkpoint file, in hexadecimal; "" for no path."""
    if not path:
        return ""
    digest = hashlib.sha256()
    with open(kept_file(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_checkpoint(model, path):
    """Write a model's weights alone, as float16."""
    with replacing(path) as temporary:
        torch.save({k: v.cpu().half() for k, v in model.state_dict().items()}, temporary)


MPI_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # set by mpiexec of MPICH, Open MPI
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUN_VARIABLES += ("MASTER_ADDR", "MASTER_PORT")


def processes_started():
    """How many processes torchrun or mpiexec started; 1 for a process on its own."""
    sizes = [os.environ[v] for v in ("WORLD_SIZE", *MPI_VARIABLES) if v in os.environ]
    return int(sizes[0]) if sizes else 1


def launched():
    """(rank, number of processes); (0, 1) for a process on its own, which needs no MPI.

    The environment afterwards says what torchrun would have said.

    Raises:
        UserError: mpiexec started several processes that cannot find each other by MPI.
    """
    size = processes_started()
    if size == 1:
        return 0, 1
    if "WORLD_SIZE" not in os.environ:
        _describe_mpi_as_torchrun(size)
    return int(os.environ["RANK"]), size


def setup_dist():
    """Join the other processes that torchrun or mpiexec started, if any, for collectives.

    Returns:
        (rank, number of processes), see `launched`.
    """
    rank, processes = launched()
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank, processes


def _describe_mpi_as_torchrun(processes):
    """Set the environment variables by which torch.distributed meets."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library for it
        raise UserError(
            f"mpiexec: {processes} processes need mpi4py to meet, which cannot be imported "
            f"({error}); install it, or start them with torchrun"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size != processes:
        raise UserError(
            f"mpiexec: it started {processes} processes, and mpi4py's MPI library knows of "
            f"{comm.size}; use the mpiexec of that library, or torchrun"
        )
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    address = port = None
    if comm.rank == 0:
        address = "127.0.0.1" if local.size == comm.size else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    address, port = comm.bcast((address, port))
    found = (comm.rank, comm.size, local.rank, local.size, address, port)
    os.environ.update(zip(TORCHRUN_VARIABLES, map(str, found), strict=True))
    MPI.Finalize()  # MPI has done its part; left open, it would wait at the end for a dead rank


def share_threads():
    """Give the processes of one machine an equal part of its cores, unless OMP_NUM_THREADS does."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if beside > 1 and "OMP_NUM_THREADS" not in os.environ:
        allowed = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if allowed else os.cpu_count()
        torch.set_num_threads(max(1, cores // beside))


def native_bf16(device):
    """Whether this device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # x86 alone can be asked; without these instructions bf16 is slower than float32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(hasattr(torch.cpu, check) and getattr(torch.cpu, check)() for check in checks)


def pick_device(gpu):
    """The device that --gpu asks for: an index, or -1 for the CPU; GPU 0 falls back to the CPU.

    Processes that torchrun or mpiexec started take one GPU each, in turn, from that index on.

    Raises:
        UserError: there is no such GPU.
    """
    count = torch.cuda.device_count()
    if gpu != -1 and count and processes_started() > 1:
        gpu = (gpu + int(os.environ.get("LOCAL_RANK", "0"))) % count
    if gpu == -1 or (gpu == 0 and count == 0):
        return torch.device("cpu")
    if not 0 <= gpu < count:
        have = f"GPUs 0 to {count - 1}" if count else "none, and -1 for the CPU"
        raise UserError(f"--gpu: there is no GPU {gpu} on this machine (it has {have})")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def pick_dtype(precision, device, use_fp16=False):
    """The torso's dtype for --precision; auto takes what the hardware is fast at.

    `use_fp16` is the model config's: with auto it stands on a GPU.
    """
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return names[precision]
    if use_fp16 and device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if native_bf16(device) else torch.float32


def pick_memory_format(device, differentiated):
    """channels_last, but where a network is differentiated on a CPU: there, the backward pass of
    PyTorch's group normalisation is 70 times slower in it.
    """
    if differentiated and device.type == "cpu":
        return torch.contiguous_format
    return torch.channels_last


def compile_network(model, device):
    """torch.compile the network in place; the first evaluation then takes minutes.

    The first shape of a batch is compiled for itself, for speed. From the second on, the sizes
    that changed are left open, so that a folder of many sizes compiles a few times, not each time.
    Evaluations under autograd (dps, pigdm) are compiled apart.

    Raises:
        UserError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, no Triton, new Python
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(f"--compile: torch.compile does not work here ({reason})") from None
    model.compile()
