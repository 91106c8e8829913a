"""What is compared: sets of images, tasks, and methods with their settings.

A setting is a dict: a method's own parameters and, under the names of `NO_PARAMETERS`, what is
changed in its schedule. Its label, "scale 1.75, clip False", stands in the
tables, so a row says what it was measured with.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from guided_diffusion.methods import METHODS
from tests.benchmarks.classical import CLASSICAL
from tests.benchmarks.deepinv_methods import DEEPINV

REPOSITORY = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
Setting = dict[str, Any]

# key of a setting → key of a diffusion YAML
SCHEDULE_KEYS = {"clip": "clip_denoised", "variance": "model_var_type"}
# `spacing` of a setting → what stands before the number of steps in timestep_respacing
SPACINGS = {"even": "", "ddim": "ddim", "quad": "quad", "logsnr": "logsnr"}
# key of a setting → where guided_diffusion.methods.start keeps it
LEVEL_KEYS = {
    **{"widest": "WIDEST_STD", "sample_widest": "SAMPLE_WIDEST_STD"},
    **{"finish": "FINISH", "sample_finish": "SAMPLE_FINISH"},
}
SAMPLES = "samples"  # key of a setting: the mean of so many samples is taken
NO_PARAMETERS = {
    "spacing",
    *SCHEDULE_KEYS,
    *LEVEL_KEYS,
    SAMPLES,
}  # all other keys are the method's own


def label(setting: Setting) -> str:
    return ", ".join(
        f"{k} {v if isinstance(v, str | bool) else f'{v:g}'}" for k, v in setting.items()
    )


class ImageSet(NamedTuple):
    """Which images of a folder: `flag` of run_all.py names it, or `root` ships."""

    root: str
    flag: str
    first: int
    every: int
    about: str
    inside: str = ""  # the folder in that of the flag
    most: int | None = None


SETS = {
    "val": ImageSet("", "--val", 0, 26, "every 26th slice of validation, from the first"),
    "tuning": ImageSet("", "--val", 13, 26, "every 26th slice of validation, from the 14th"),
    "shipped": ImageSet(
        os.path.join(REPOSITORY, "data", "mri_256_orig"), "", 0, 1, "the ten shipped slices"
    ),
    "ood": ImageSet("", "--ood", 0, 3, "every third slice of other scanners and contrasts"),
}
# source of --multi → every how many'th of its slices is taken, up to ten
SOURCES = {
    **{"brats2013_brain": 1, "cheng_t1ce": 9, "ixi_pd": 1, "ixi_t1t2": 1, "lgg_channels": 6},
    **{"oasis_t1_brain": 5, "openms_longitudinal": 3, "tcia_btp_t1ce": 1},
}
SETS |= {
    name: ImageSet("", "--multi", 0, every, f"slices of {name}", name, 10)
    for name, every in SOURCES.items()
}
TASKS = ("sr4", "denoise", "gauss", "uniform")
ALL_TASKS = (*TASKS, "denoise_0.75")
OURS = ("spectral", "spectral_sample")  # this program's own methods
OWN: list[str] = []  # tasks that --task_config adds
OPERATOR = {
    **{"sr4": "super_resolution", "gauss": "deblur", "uniform": "deblur"},
    **{"denoise": "denoise", "denoise_0.75": "denoise"},
}


class Compared(NamedTuple):
    """A method of the prior in the comparison.

    published: task → the setting that its authors published, or for our own, that ships.
    grid: the settings among which it is tuned, the same number for every method.
    tuned_at: numbers of network evaluations at which it is tuned.
    twin: another method that is the same map wherever there is noise.
    """

    published: Callable[[str], Setting]
    grid: tuple[Setting, ...] = ()
    tuned_at: tuple[int, ...] = (20,)
    twin: str = ""


def _grid(names: str, *points: tuple, **rest: Any) -> tuple[Setting, ...]:
    return tuple(dict(zip(names.split(), point, strict=True)) | rest for point in points)


def _diffpir(task: str) -> Setting:
    """DiffPIR's authors give no values for denoising: those of deblurring."""
    lambda_, zeta = (15, 0.25) if task == "sr4" else (7, 0.3)
    return {"lambda_": lambda_, "zeta": zeta, "spacing": "quad", "clip": True}


DDRM = {"spacing": "ddim", "clip": False}
COMPARED = {
    "dmps": Compared(
        lambda task: {"scale": 1.75, "variance": "learned_range", "clip": True},
        _grid("scale", (0.5,), (0.75,), (1,), (1.25,), (1.75,), (2.5,), (3.5,)),
        (20, 100),
    ),
    "dps": Compared(
        lambda task: {"scale": 0.3, "variance": "learned_range", "clip": True},
        # Far above the published one too: as few steps as 20 have to be that much longer.
        _grid("scale", (1,), (4,), (16,), (32,), (64,), (128,), (256,), clip=True),
        (20, 100),
    ),
    "ddrm": Compared(
        lambda task: {"eta": 0.85, "eta_b": 1, **DDRM},
        _grid(
            "eta eta_b",
            (0, 1), (0.3, 1), (0.5, 1), (0.7, 1), (0.85, 1), (1, 1), (0.85, 0.85),
            **DDRM,
        ),
        (20, 100),
    ),
    # With noise the same map as DDRM with η_b = 1, whose grid is therefore its own.
    "ddnm": Compared(lambda task: {"eta": 0.85, **DDRM}, twin="ddrm"),
    "diffpir": Compared(
        _diffpir,
        _grid(
            "lambda_ zeta",
            (7, 0.3), (1, 1), (2, 1), (4, 1), (7, 1), (15, 1), (28, 1),
            spacing="quad", clip=True,
        ),
        (20, 100),
    ),
    "pigdm": Compared(
        lambda task: {"eta": 1, "spacing": "ddim", "clip": False},
        _grid("eta", (0,), (0.2,), (0.5,), (0.8,), (1,), spacing="ddim", clip=False)
        + _grid("eta", (0.5,), (1,), spacing="ddim", clip=True),
        (20, 100),
    ),
    "spectral": Compared(
        lambda task: {"kappa": 2, "kappa_noise": 0.35, "widest": 1.5, "finish": 0.1},
        # One κ for both, as in k-space, is its third.
        _grid(
            "kappa kappa_noise widest finish",
            (2, 0.35, 3, 0.1), (1, 0.35, 3, 0.1), (2, 2, 3, 0.1), (2, 0.2, 3, 0.1),
            (2, 0.7, 3, 0.1), (2, 0.35, 3, 0.05), (2, 0.35, 1.5, 0.1),
        ),
        (10, 20),
    ),
    "spectral_sample": Compared(
        lambda task: {"kappa": 1, "sample_widest": 3, "sample_finish": 0.1},
        _grid(
            "kappa sample_widest sample_finish",
            (1, 3, 0.1), (0.35, 3, 0.1), (0.5, 3, 0.1), (0.7, 3, 0.1), (1.4, 3, 0.1), (1, 3, 0.05),
            (1, 3, 0.2),
        ),
    ),
}  # fmt: skip


def compared(method: str) -> Compared:
    """A method that has no row above is compared with its defaults."""
    return COMPARED.get(method) or Compared(lambda task: METHODS[method].check({}))


def names() -> tuple[str, ...]:
    """All methods in the order of the tables."""
    return (*METHODS, *DEEPINV, *CLASSICAL)


class Job(NamedTuple):
    """One row of a table for every image of a set.

    every: takes every so many'th of the set's images, `first` only so many of these, spread over
    them; both are for what takes long.
    """

    set: str
    task: str
    method: str
    setting: Setting
    steps: int  # network evaluations that are asked for
    every: int = 1
    first: int | None = None


STEPS = (5, 10, 20, 50, 100)  # of the frontier


def dict_of(settings: tuple[Setting, ...]) -> list[Setting]:
    """Each setting once."""
    return list({label(s): s for s in settings}.values())


def classical_for(task: str) -> list[str]:
    return [n for n, m in CLASSICAL.items() if OPERATOR[task] in m.operators]
