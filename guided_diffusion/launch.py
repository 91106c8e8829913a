"""What torchrun, mpiexec or nobody started: this process's rank, and how many there are."""

import contextlib
import datetime
import importlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from util.errors import UserError

PATIENCE = datetime.timedelta(days=1)  # the first validates alone, and launchers notice the dead
MPI_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # set by mpiexec of MPICH, Open MPI
TORCHRUN_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def _number(name: str) -> int | None:
    """A variable of the environment as an integer; None where it is not set, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"environment variable {name}: expected a number, found {text!r}")
    return int(text)


def processes_started() -> int:
    """How many processes torchrun or mpiexec started; 1 for a process on its own.

    WORLD_SIZE without RANK, as job scripts export it, says nothing of this process.

    Raises:
        UserError: a variable that torchrun or mpiexec sets is not a number, or is missing beside
            the others.
    """
    size, rank = _number("WORLD_SIZE"), _number("RANK")
    if size is not None and rank is not None:
        missing = [v for v in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(v)]
        if size > 1 and missing:
            raise UserError(
                f"environment variable {missing[0]}: not set, though WORLD_SIZE is {size} and RANK "
                f"{rank}; start the processes with torchrun, which sets all of them"
            )
        return size
    sizes = [found for found in map(_number, MPI_VARIABLES) if found is not None]
    return sizes[0] if sizes else 1


def note_if_alone() -> None:
    """Say on stderr that WORLD_SIZE promises more processes than there are."""
    size = _number("WORLD_SIZE")
    if size is not None and size > 1 and processes_started() == 1:
        print(
            f"note: WORLD_SIZE is {size} and RANK is not set, so this process works alone; "
            "torchrun starts several",
            file=sys.stderr,
        )


def launched() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) for a process on its own, which needs no MPI.

    The environment afterwards says what torchrun would have said.

    Raises:
        UserError: mpiexec started several processes that cannot find each other by MPI.
    """
    size = processes_started()
    if size == 1:
        return 0, 1
    if _number("RANK") is None or _number("WORLD_SIZE") is None:
        _describe_mpi_as_torchrun(size)
    return int(os.environ["RANK"]), size


def setup_dist() -> tuple[int, int]:
    """Join the other processes that torchrun or mpiexec started, if any, for collectives.

    Returns:
        (rank, number of processes), see `launched`.

    Raises:
        UserError: see `launched`; or there are GPUs, but not one for each process of a machine.
    """
    note_if_alone()
    rank, processes = launched()
    beside, gpus = _number("LOCAL_WORLD_SIZE") or 1, torch.cuda.device_count()
    own = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # a launcher gave each process one
    if beside > gpus > 0 and not own:  # NCCL would refuse two on one, as a mistake of its own
        raise UserError(
            f"{beside} processes were started on a machine with {gpus} GPU{'s' * (gpus > 1)}, "
            "expected at most one for each"
        )
    if processes > 1 and not dist.is_initialized():
        # Its default arguments keep the group that exists when DistributedDataParallel imports it:
        # gloo's threads would outlive the interpreter, which then sometimes aborts at exit.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return rank, processes


def gathered(value: Any) -> list[Any]:
    """What each process has for `value`, which can be pickled, in the order of their ranks."""
    if processes_started() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block in every process; where one cannot go on, none does.

    Raises:
        UserError: the block's, in a process on its own.
        SystemExit: it was raised in one of several; each sentence has been printed, once.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    if processes_started() == 1:
        if failure is not None:
            raise failure
        return
    sentences = gathered(None if failure is None else str(failure))
    if not any(sentences):
        return
    if failure is not None and sentences.index(str(failure)) == dist.get_rank():
        print(f"error: {failure}", file=sys.stderr, flush=True)
    dist.barrier()  # a launcher ends all others as soon as one has ended
    dist.destroy_process_group()
    sys.exit(2)


def lost_others(error: Exception) -> bool:
    """Whether an error is that another process does not answer any more."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo/transport" in str(error)


def local_rank() -> int:
    """This process's number among those of its machine."""
    return _number("LOCAL_RANK") or 0


def _describe_mpi_as_torchrun(processes: int) -> None:
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


def share_threads() -> None:
    """Give the processes of one machine an equal part of its cores, unless OMP_NUM_THREADS does."""
    beside = _number("LOCAL_WORLD_SIZE") or 1
    if beside > 1 and not os.environ.get("OMP_NUM_THREADS"):
        allowed = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if allowed else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // beside))
