"""DMPS-MRI: restore MR slices with a diffusion prior. ``python main.py --help`` explains."""

import signal
import sys
from functools import partial
from typing import Any

import torch.distributed as dist

from guided_diffusion.options import parse_args
from guided_diffusion.ranks import Ranks, share_out
from guided_diffusion.run import run
from util import terminal
from util.errors import UserError, hindrance

# Builds of torch without torch.distributed work in one process.
DistError: Any = getattr(dist, "DistError", ())
ON = "the same command resumes where it stopped"


def main(argv: list[str] | None = None) -> int:
    """Restore what the command line asks for; returns the exit status."""
    terminal.prepare()
    try:
        options = parse_args(argv)
        return share_out(partial(guarded, partial(run, options)))
    except UserError as error:
        terminal.say(f"error: {error}", error=True)
        return 2
    finally:
        terminal.finish()


def guarded(work, ranks: Ranks) -> int:
    """Do a process's part; what a user can mend ends it with one sentence and a status."""
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        return work(ranks)
    except UserError as error:
        return end(ranks, f"error: {error}", 2)
    except DistError:
        print(f"error: the first process has gone; {ON}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        stopped = hindrance(error, "--save_dir", "--batch_size")
        if stopped is None:
            raise
        return end(ranks, f"error: {stopped}, and {ON}", 2)
    except KeyboardInterrupt:
        return end(ranks, "interrupted: run the same command again to resume where it stopped", 130)


def end(ranks: Ranks, text: str, status: int) -> int:
    ranks.say(text, error=True)
    return status


def interrupt(signum, frame):
    """Stop, as Ctrl-C does; launchers send more than one signal, and one is enough."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
