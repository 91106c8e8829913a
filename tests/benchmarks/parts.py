"""The parts of the measuring: which jobs, in which order.

A part is a few stages, each a list of jobs. A stage may depend on what the ones before it measured:
a `Choice` tells it which settings are still tried and which are best.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from guided_diffusion.methods import METHODS
from tests.benchmarks.comparison import shipped_scale
from tests.benchmarks.settings import (
    ALL_TASKS,
    DEEPINV,
    OURS,
    OWN,
    SAMPLES,
    SOURCES,
    STEPS,
    TASKS,
    Job,
    Setting,
    classical_for,
    compared,
    dict_of,
    names,
)

FIRST = 3  # tuning slices which all settings restore; the leaders restore the others, too
FEW = (10, 20, 100)  # evaluations of `spectral` that a reader may choose from
ROUNDS = 6  # of candidates, where the best so far tell which come next: from end to end of a grid


class Choice(NamedTuple):
    """What the sweeps say of a method, a task and a number of evaluations; see `tuned`.

    best: the tuned setting, None where there is none.
    candidates: the settings tried on the first slices.
    leaders: those tried on all of them.
    """

    best: Callable[[str, str, int], Setting | None]
    candidates: Callable[[str, str, int], list[Setting]]
    leaders: Callable[[str, str, int], list[Setting]]


Stage = Callable[[Choice], list[Job]]
Stages = tuple[Stage, ...]


def swept(levels: tuple[int, ...], every: int = 1) -> Stages:
    """The sweeps at these numbers of evaluations, on every so many'th of the tuning slices."""
    runs = [
        (task, name, steps)
        for steps in levels
        for task in TASKS
        for name in METHODS
        if compared(name).grid and steps in compared(name).tuned_at
    ]
    return halved(runs, every)


def halved(runs: list[tuple[str, str, int]], every: int = 1) -> Stages:
    """The stages of each (task, method, evaluations).

    The candidates restore the first tuning slices, then the leaders all of them.
    """

    def jobs(settings: Callable[[str, str, int], list[Setting]], first: int | None) -> list[Job]:
        return [
            Job("tuning", task, name, setting, steps, every, first)
            for task, name, steps in runs
            for setting in settings(name, task, steps)
        ]

    return (
        *(lambda choice: jobs(choice.candidates, FIRST),) * ROUNDS,
        lambda choice: jobs(choice.leaders, None),
    )


def headline(choice: Choice) -> list[Job]:
    """What readers ask first: `spectral` as shipped, and what the others published."""
    few = [("spectral", steps) for steps in (10, 20)]
    peers = [
        (name, steps)
        for steps in (20, 100)
        for gradient in (False, True)
        for name, method in METHODS.items()
        if name not in OURS and method.needs_gradient is gradient and shown(name, steps)
    ]
    return [
        Job("val", task, name, compared(name).published(task), steps)
        for name, steps in few + peers
        for task in TASKS
    ]


def shown(name: str, steps: int) -> bool:
    """Whether a method is measured: another's twin only at 20 evaluations, to show that it is."""
    return not compared(name).twin or steps == 20


def both(task: str, name: str, steps: int, choice: Choice) -> list[Setting]:
    """The published setting, and the tuned one where there is another."""
    found = choice.best(name, task, steps)
    return dict_of((compared(name).published(task), *([found] if found else [])))


def frontier(choice: Choice, tasks: Iterable[str] = TASKS) -> list[Job]:
    return [
        Job("val", task, name, setting, steps)
        for steps in sorted(STEPS, key=lambda n: (n not in (20, 100), n))
        for task in tasks
        for name in METHODS
        if shown(name, steps)
        for setting in both(task, name, steps, choice)
    ]


def own(choice: Choice) -> list[Job]:
    """The tasks of --task_config."""
    return frontier(choice, OWN)


def thousand(choice: Choice) -> list[Job]:
    """Each method once, as published: nothing is tuned for so many."""
    return [
        Job("val", task, name, compared(name).published(task), steps, 4)
        for steps in (100, 1000)
        for name in METHODS
        if shown(name, steps)
        for task in TASKS
    ]


def classical(choice: Choice) -> list[Job]:
    return [
        Job(images, task, name, setting, 0)
        for images in ("val", "shipped", "ood")
        for task in ALL_TASKS
        for name in classical_for(task)
        if (setting := choice.best(name, task, 0)) is not None
    ]


def shipped_settings(images: str, tasks: tuple[str, ...]) -> list[Job]:
    """What the shipped files give: a few steps, samples and their mean."""
    few, sample = (compared(name).published for name in OURS)
    return [
        Job(images, task, *run)
        for task in tasks
        for run in (
            *(("spectral", few(task), steps) for steps in FEW),
            ("spectral_sample", sample(task), 20),
            ("spectral_sample", sample(task) | {SAMPLES: 8}, 20),
        )
    ]


def shipped(choice: Choice) -> list[Job]:
    dmps = [Job("shipped", task, "dmps", {"scale": shipped_scale(task)}, 100) for task in TASKS]
    return dmps + shipped_settings("shipped", TASKS)


def ood(choice: Choice | None = None) -> list[Job]:
    return shipped_settings("ood", ALL_TASKS)


DENOISERS = (
    ("bm3d", {"strength": 1}, 0),
    ("spectral", compared("spectral").published("denoise"), 2),
)


def denoiser(choice: Choice) -> list[Job]:
    """Two evaluations, by `spectral`, beside BM3D that is told the noise, source by source."""
    return [
        Job(images, task, *run)
        for images in ("val", *SOURCES)
        for task in ("denoise", "denoise_0.75")
        for run in DENOISERS
    ]


def calibration(choice: Choice | None = None) -> list[Job]:
    """Means of eight samples, and how honest their spread is; of DMPS on every fifth slice."""
    dmps = [
        Job("val", task, "dmps", {"scale": 1, "variance": variance, SAMPLES: 8}, 50, 5)
        for task in TASKS
        for variance in ("learned_range", "fixed_small")
    ]
    samples = [j for j in shipped_settings("val", ALL_TASKS) if j.method == "spectral_sample"]
    return samples + dmps


def clipping(choice: Choice) -> list[Job]:
    """x̂_0 clipped or not, otherwise as published, on two of the tuning slices."""
    return [
        Job("tuning", task, name, compared(name).published(task) | {"clip": clip}, steps, 5)
        for name in METHODS
        for task in TASKS
        for steps in ((20, 100) if name == "dmps" else (20,))
        for clip in (True, False)
    ]


def variance(choice: Choice) -> list[Job]:
    """DMPS with the variance that the network learned and the posterior's own."""
    return [
        Job("tuning", task, "dmps", {"scale": 1, "variance": kind}, 100, 5)
        for task in ("sr4", "denoise")
        for kind in ("learned_range", "fixed_small")
    ]


def deepinv(choice: Choice) -> list[Job]:
    return [Job("val", task, name, {}, 20, 5) for task in TASKS for name in DEEPINV]


PARTS: dict[str, Stages] = {
    "headline": (headline,),
    "tuning": (*swept((20, 10)), *swept((100,), every=2)),
    "frontier": (frontier,),
    "classical_tuning": halved([(t, name, 0) for t in ALL_TASKS for name in classical_for(t)]),
    "classical": (classical,),
    "shipped": (shipped,),
    "ood": (ood,),
    "denoiser": (denoiser,),
    "calibration": (calibration,),
    "clipping": (clipping,),
    "variance": (variance,),
    "thousand": (thousand,),
    "deepinv": (deepinv,),
    "own": (own,),
}
# Without --part: a part, and up to how many evaluations. What most readers look for comes first, so
# that an interrupted call leaves whole tables.
ORDER: tuple[tuple[str, float], ...] = (
    ("headline", math.inf),
    ("denoiser", math.inf),
    ("classical_tuning", math.inf),
    ("classical", math.inf),
    ("tuning", 20),
    ("frontier", 20),
    ("tuning", math.inf),
    ("frontier", math.inf),
    ("shipped", math.inf),
    ("ood", math.inf),
    ("calibration", math.inf),
    ("clipping", math.inf),
    ("variance", math.inf),
    ("thousand", math.inf),
)


def share_of(job: Job, count: int) -> int:
    """Which of `count` processes, from 1 on, measures a job.

    What is tuned depends on rows of the same task and method alone, so these stay together, and
    each process has its part of every method.
    """
    return ((*ALL_TASKS, *OWN).index(job.task) + names().index(job.method)) % count + 1
