"""What is compared: sets of images, methods with their settings, and the parts of the measuring.

A setting is a dict: a method's own parameters and, under the names of `NO_PARAMETERS`, what is
changed in its schedule. Its label, "scale 1.75, clip False", stands in the
tables, so a row says what it was measured with.
"""

import os
from collections.abc import Callable, Iterable
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
LEVEL_KEYS = {"widest": "WIDEST_STD", "finish": "FINISH", "sample_finish": "SAMPLE_FINISH"}
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
    """

    published: Callable[[str], Setting]
    grid: tuple[Setting, ...] = ()
    tuned_at: tuple[int, ...] = (20,)


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
        _grid("scale", (0.3,), (0.6,), (1,), (2,), (4,), (8,), (16,), clip=True),
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
    "ddnm": Compared(lambda task: {"eta": 0.85, **DDRM}),
    "diffpir": Compared(
        _diffpir,
        _grid(
            "lambda_ zeta",
            (7, 0.3), (28, 0.3), (2, 1), (4, 1), (7, 1), (15, 1), (28, 1),
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
        lambda task: {"kappa": 2, "widest": 3, "finish": 0.1},
        _grid(
            "kappa widest finish",
            (2, 3, 0.1), (1, 3, 0.1), (4, 3, 0.1), (2, 3, 0.05), (2, 3, 0.2), (2, 1.5, 0.1),
            (2, 6, 0.1),
        ),
        (10, 20),
    ),
    "spectral_sample": Compared(
        lambda task: {"kappa": 1, "widest": 3, "sample_finish": 0.1},
        _grid(
            "kappa widest sample_finish",
            (1, 3, 0.1), (0.5, 3, 0.1), (0.7, 3, 0.1), (1.4, 3, 0.1), (2, 3, 0.1), (1, 3, 0.05),
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
    """One row of a table for every image of a set."""

    set: str
    task: str
    method: str
    setting: Setting
    steps: int  # network evaluations that are asked for
    every: int = 1  # of the set's images, for what takes long


STEPS = (5, 10, 20, 50, 100)
Tuned = Callable[[str, str, int], Setting | None]


def tuning(tuned: Tuned) -> list[Job]:
    """The sweeps; at 100 evaluations on every second slice."""
    return [
        Job("tuning", task, name, setting, steps, 2 if steps > 20 else 1)
        for steps in (20, 10, 100)
        for task in TASKS
        for name in METHODS
        if compared(name).grid and steps in compared(name).tuned_at
        for setting in dict_of(compared(name).grid + (compared(name).published(task),))
    ]


def dict_of(settings: tuple[Setting, ...]) -> list[Setting]:
    """Each setting once."""
    return list({label(s): s for s in settings}.values())


def both(task: str, name: str, steps: int, tuned: Tuned) -> list[Setting]:
    """The published setting, and the tuned one where there is another."""
    found = tuned(name, task, steps)
    return dict_of((compared(name).published(task), *([found] if found else [])))


def frontier(tuned: Tuned, tasks: Iterable[str] = TASKS) -> list[Job]:
    return [
        Job("val", task, name, setting, steps)
        for steps in STEPS
        for task in tasks
        for name in METHODS
        for setting in both(task, name, steps, tuned)
    ]


def own(tuned: Tuned) -> list[Job]:
    """The tasks of --task_config."""
    return frontier(tuned, OWN)


def thousand(tuned: Tuned) -> list[Job]:
    return [
        Job("val", task, name, setting, 1000, 4)
        for name in METHODS
        for task in TASKS
        for setting in both(task, name, 1000, tuned)[: 1 if METHODS[name].needs_gradient else None]
    ]


def classical_tuning(tuned: Tuned) -> list[Job]:
    return [
        Job("tuning", task, name, setting, 0)
        for task in ALL_TASKS
        for name in classical_for(task)
        for setting in CLASSICAL[name].grid
    ]


def classical_for(task: str) -> list[str]:
    return [n for n, m in CLASSICAL.items() if OPERATOR[task] in m.operators]


def classical(tuned: Tuned) -> list[Job]:
    return [
        Job(images, task, name, setting, 0)
        for images in ("val", "shipped", "ood")
        for task in ALL_TASKS
        for name in classical_for(task)
        if (setting := tuned(name, task, 0)) is not None
    ]


def shipped_settings(images: str, tasks: tuple[str, ...]) -> list[Job]:
    """What the shipped files give: a few steps, samples and their mean."""
    few, sample = (compared(name).published for name in ("spectral", "spectral_sample"))
    return [
        Job(images, task, *run)
        for task in tasks
        for run in (
            ("spectral", few(task), 10),
            ("spectral_sample", sample(task), 20),
            ("spectral_sample", sample(task) | {SAMPLES: 8}, 20),
        )
    ]


SHIPPED_SCALE = {"sr4": 1.75, "denoise": 1, "gauss": 1, "uniform": 1}  # λ of the task files


def shipped(tuned: Tuned) -> list[Job]:
    dmps = [
        Job("shipped", task, "dmps", {"scale": scale}, 100) for task, scale in SHIPPED_SCALE.items()
    ]
    return dmps + shipped_settings("shipped", TASKS)


def ood(tuned: Tuned) -> list[Job]:
    return shipped_settings("ood", ALL_TASKS)


DENOISERS = (
    ("bm3d", {"strength": 1}, 0),
    ("spectral", compared("spectral").published("denoise"), 2),
)


def denoiser(tuned: Tuned) -> list[Job]:
    """Two evaluations, by `spectral`, beside BM3D that is told the noise, source by source."""
    return [
        Job(images, task, *run)
        for images in ("val", *SOURCES)
        for task in ("denoise", "denoise_0.75")
        for run in DENOISERS
    ]


def calibration(tuned: Tuned) -> list[Job]:
    """Means of eight samples, and how honest their spread is; of DMPS on every fifth slice."""
    dmps = [
        Job("val", task, "dmps", {"scale": 1, "variance": variance, SAMPLES: 8}, 50, 5)
        for task in TASKS
        for variance in ("learned_range", "fixed_small")
    ]
    return [job for job in shipped_settings("val", ALL_TASKS) if job.steps == 20] + dmps


def clipping(tuned: Tuned) -> list[Job]:
    """x̂_0 clipped or not, otherwise as published, on two of the tuning slices."""
    return [
        Job("tuning", task, name, compared(name).published(task) | {"clip": clip}, steps, 5)
        for name in METHODS
        for task in TASKS
        for steps in ((20, 100) if name == "dmps" else (20,))
        for clip in (True, False)
    ]


def variance(tuned: Tuned) -> list[Job]:
    """DMPS with the variance that the network learned and the posterior's own."""
    return [
        Job("tuning", task, "dmps", {"scale": 1, "variance": kind}, 100, 5)
        for task in ("sr4", "denoise")
        for kind in ("learned_range", "fixed_small")
    ]


def deepinv(tuned: Tuned) -> list[Job]:
    return [Job("val", task, name, {}, 20, 5) for task in TASKS for name in DEEPINV]


PARTS = {
    "tuning": tuning,
    "frontier": frontier,
    "classical_tuning": classical_tuning,
    "classical": classical,
    "shipped": shipped,
    "ood": ood,
    "denoiser": denoiser,
    "calibration": calibration,
    "clipping": clipping,
    "variance": variance,
    "thousand": thousand,
    "deepinv": deepinv,
    "own": own,
}
