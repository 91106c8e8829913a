"""Every method at every number of steps, beside deepinv: ``python tests/benchmarks/peers.py``.

All restore the same measurements of the same slices with the same network: every method of
main.py, and deepinv's DDRM, DiffPIR and DPS through its own interfaces. --out receives peers.md,
peers.csv and peers_images.csv: PSNR, SSIM, NMSE, the ratio of high-frequency energy to the
truth's, seconds an image; frontier.md, the first, second and fourth of these with a column a task;
and frontier.png, PSNR and SSIM against --steps. --join adds the rows of earlier runs that restored
the same images, so that one table can be made of several runs. main.py's methods clip x̂_0 at every
step, as published, whatever the shipped files of their schedules say; with --no_clip none does. deepinv
is not among the requirements: ``pip install deepinv``.

deepinv works on images u = (x+1)/2 in [0, 1], where the measurement is (y + A 1)/2 = A u + σ/2 n
(A 1 is no constant near the edge of a blur). Its methods keep their default parameters.
"""

import argparse
import csv
import itertools
import os
import sys
import time

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.nn.functional import pad

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.condition_methods import METHODS
from guided_diffusion.gaussian_diffusion import space_timesteps
from guided_diffusion.measurements import Factor, SeparableOperator
from tests.benchmarks import comparison
from tests.benchmarks.comparison import operator_of
from util.errors import ArgumentParser, UserError
from util.files import replacing, replacing_text
from util.flags import positive
from util.random import image_generator

OWN = tuple(name for name in METHODS if name != "vanilla")


def parse_args(argv=None):
    parser = ArgumentParser(
        description="Compare this program's methods with deepinv's, on the same prior.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    comparison.add_common(add, out="results/peers")
    add(
        "--methods",
        nargs="*",
        choices=NAMES,
        default=NAMES,
        help="none: only join",
    )
    add("--steps", nargs="+", type=positive, default=[20], help="network evaluations an image")
    add(
        "--no_clip",
        action="store_true",
        help="leave x̂_0 outside [-1, 1] as it is, in rows of their own",
    )
    add(
        "--join",
        nargs="+",
        metavar="FOLDER",
        default=[],
        help="the --out of earlier runs with the same prior and seed, whose rows of the chosen "
        "tasks and images are to stand in the tables, too",
    )
    return parser.parse_args(argv)


def full_operator(operator):
    """The same A = U Σ Vᵀ with a square V: deepinv takes V Vᵀ for the identity.

    Every axis' V is completed to a basis; the singular values of what is added are 0, and so are
    its columns of U.
    """
    factors = []
    for f in operator.factors:
        if f.V is not None:
            n, k = f.V.shape
            rest = torch.linalg.qr(f.V.double(), mode="complete").Q[:, k:].to(f.V)
            f = Factor(pad(f.U, (0, n - k)), pad(f.s, (0, n - k)), torch.cat([f.V, rest], dim=1))
        factors.append(f)
    s = operator.singular_values
    return SeparableOperator(*factors, device=s.device, dtype=s.dtype)


def import_deepinv():
    try:
        import deepinv
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        raise UserError(
            f"--methods: deepinv cannot be imported ({error}); pip install deepinv, with the "
            "torchvision that fits your torch, or leave its methods out"
        ) from None
    return deepinv


def physics_of(task, operator):
    """The task as deepinv has it, for images in [0, 1]."""
    deepinv, full = import_deepinv(), full_operator(operator)
    return deepinv.physics.DecomposablePhysics(
        U=full.U,
        U_adjoint=full.Ut,
        V=full.V,
        V_adjoint=full.Vt,
        mask=full.singular_values[None],
        img_size=tuple(operator.in_shape),
        noise_model=deepinv.physics.GaussianNoise(task.noise.sigma / 2),
        device=full.singular_values.device,
    )


def denoiser_of(prior):
    """The network as deepinv has denoisers: (u + σ n, σ) → u, images in [0, 1]."""

    class NetworkDenoiser(import_deepinv().models.Denoiser):
        def forward(self, u, sigma, **kwargs):
            """u: (N, C, H, W); sigma: a number or (N,) of them.

            The network's noise at the t of nearest noise level, taken out by the share sigma.
            """
            x, diffusion = 2 * u - 1, prior.every_t
            sigma = 2 * self._handle_sigma(sigma, batch_size=len(u), device=u.device)
            levels = torch.from_numpy(diffusion.alphas_cumprod).to(u)
            levels = torch.sqrt((1 - levels) / levels)
            t = (levels.log() - sigma.to(u).clamp(min=1e-6).log()[:, None]).abs().argmin(dim=1)
            x_t = diffusion.at("sqrt_alpha_bar", t, x) * x
            x_0 = diffusion.p_mean_variance(prior.model, x_t, t)["pred_xstart"]
            share = (sigma.to(u) / levels[t]).reshape(-1, 1, 1, 1)  # D(u, 0) is u
            return (x + share * (x_0 - x) + 1) / 2

    return NetworkDenoiser(device=prior.device)


def deepinv_ddrm(denoiser, physics, steps):
    sigmas = np.linspace(1, 0, steps)  # its default, for this many steps
    return import_deepinv().sampling.DDRM(denoiser, sigmas=sigmas)


def deepinv_diffpir(denoiser, physics, steps):
    deepinv = import_deepinv()
    return deepinv.sampling.DiffPIR(
        denoiser,
        deepinv.optim.data_fidelity.L2(),
        sigma=physics.noise_model.sigma.item(),
        max_iter=steps,
        device=physics.mask.device,
    )


def deepinv_dps(denoiser, physics, steps):
    times = steps + 1  # it evaluates the network between them
    return import_deepinv().sampling.DPS(denoiser, num_steps=times, device=physics.mask.device)


PEERS = {
    "deepinv_ddrm": deepinv_ddrm,
    "deepinv_diffpir": deepinv_diffpir,
    "deepinv_dps": deepinv_dps,
}
NAMES = (*OWN, *PEERS)  # in the order of the tables
NO_CLIPPING = ", no clipping"  # follows the name of a method in them
LABELS = [f"{name}{end}" for name in NAMES for end in ("", NO_CLIPPING)]


def restore_with_peer(name, task, image, prior, steps, seed):
    """x̂ (1, 1, H, W) in [-1, 1], by one of `PEERS`, and the seconds that it took."""
    operator = operator_of(task, tuple(image.truth.shape[1:]), prior.device)
    physics = physics_of(task, operator)
    reconstruct = PEERS[name](denoiser_of(prior), physics, steps)
    y = image.y.to(prior.device)
    y = (y + operator.forward(torch.ones_like(image.truth, device=prior.device))) / 2
    torch.manual_seed(image_generator(image.name, 0, seed).initial_seed())
    start = time.perf_counter()
    x_hat = (2 * reconstruct(y, physics) - 1).clamp(-1, 1).float().cpu()
    return x_hat, time.perf_counter() - start


def restore_with_own(name, task, image, prior, steps, seed, clip=True):
    """x̂ (1, 1, H, W) by a method of main.py, the seconds, and the evaluations."""
    params = {"scale": task.scale} if name == "dmps" else {}
    schedule = prior.schedules.get(name, prior.schedules["dmps"])
    respacing = f"logsnr{steps}" if name in comparison.OWN_SCHEDULES else steps
    schedule = {**schedule, "timestep_respacing": respacing, "clip_denoised": clip}
    start = time.perf_counter()
    x_hat, taken = comparison.sample(name, params, schedule, task, [image], 0, prior, seed)
    return x_hat, time.perf_counter() - start, taken


def rows_of(task, name, slices, prior, steps, seed, clip):
    rows = []
    with comparison.progress(task, f"{name} {steps}", len(slices), "image") as bar:
        for image in slices:
            if name in PEERS:
                x_hat, seconds = restore_with_peer(name, task, image, prior, steps, seed)
                taken = steps
            else:
                own = restore_with_own(name, task, image, prior, steps, seed, clip)
                x_hat, seconds, taken = own
            parameters = {"steps": taken} | ({} if clip or name in PEERS else {"clip": False})
            rows.append(comparison.row(task, name, parameters, image, x_hat, seconds))
            bar.update()
    return rows


def joined_rows(folders, tasks, names):
    """The rows of earlier runs for these tasks and all of these images, each but once."""
    rows, keys = {}, ("task", "method", "parameters", "image")
    for folder in folders:
        path = os.path.join(folder, "peers_images.csv")
        try:
            with open(path, newline="", encoding="utf-8") as file:
                found = list(csv.DictReader(file))
        except OSError as error:
            raise UserError(f"--join: cannot read {path} ({error.strerror})") from None
        for r in found:
            if r["task"] in tasks and r["image"] in names:
                figures = {k: float(v) for k, v in r.items() if k not in keys}
                rows.setdefault(tuple(r[k] for k in keys), {k: r[k] for k in keys} | figures)
    for key, group in itertools.groupby(sorted(rows), key=lambda row: row[:3]):
        missing = names - {image for *_, image in group}
        if missing:
            raise UserError(
                f"--join: {' '.join(key)} of {', '.join(folders)} lacks {', '.join(sorted(missing))}"
            )
    return list(rows.values())


def in_order(rows, tasks):
    """Rows sorted as a single run would have written them."""

    def place(r):
        return tasks.index(r["task"]), LABELS.index(label(r)), evaluations(r)

    return sorted(rows, key=place)


def compare(args):
    """Run everything, rewriting the tables after each part; returns the summary's lines."""
    if not PEERS.keys().isdisjoint(args.methods):
        import_deepinv()
    images = comparison.read_images(args)
    tasks = list(dict.fromkeys(args.tasks))
    rows = joined_rows(args.join, tasks, {name for name, _ in images})
    prior = comparison.load_prior(args) if args.methods else None
    for steps in args.steps if prior else ():  # impossible ones are found before anything else
        space_timesteps(prior.every_t.num_timesteps, steps)
    comparison.make_folder(args.out)
    description = comparison.describe_setting(args, images, prior, "batch 1")
    if not args.methods:
        write(args.out, description, in_order(rows, tasks))
    for task in map(comparison.read_task, tasks if args.methods else ()):
        slices = comparison.measure(task, images, args.seed)
        for name in dict.fromkeys(args.methods):
            # A measurement may need fewer evaluations than asked for.
            known = {r["parameters"] for r in rows if (r["task"], r["method"]) == (task.name, name)}
            for steps in args.steps:
                found = rows_of(task, name, slices, prior, steps, args.seed, not args.no_clip)
                if found[0]["parameters"] not in known:
                    known.add(found[0]["parameters"])
                    rows += found
                write(args.out, description, in_order(rows, tasks))
    return comparison.summarise(in_order(rows, tasks))


def write(folder, description, rows):
    comparison.write_tables(folder, description, rows, stem="peers")
    lines, path = comparison.summarise(rows), os.path.join(folder, "frontier")
    try:
        with replacing_text(f"{path}.md") as file:
            file.write(f"{description}\n{frontier_table(lines)}")
        draw_frontier(f"{path}.png", lines)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}.* ({error.strerror})") from None


def evaluations(line):
    """Network evaluations an image, of a row or a line of the summary."""
    return int(line["parameters"].split()[1].rstrip(","))


def label(line):
    """The method of a row or line, and whether it was run without clipping."""
    return line["method"] + (NO_CLIPPING if "clip" in line["parameters"] else "")


def frontier_table(lines):
    """Markdown: a row a method and number of evaluations, a column a task."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    cells = {}
    for line in lines:
        figures = "{psnr:.2f} / {ssim:.3f} / {hf_ratio:.2f}".format(**line)
        cells.setdefault((label(line), evaluations(line)), {})[line["task"]] = figures
    order = sorted(cells, key=lambda key: (LABELS.index(key[0]), key[1]))
    rows = [["method", "evaluations", *tasks], ["---"] * (2 + len(tasks))]
    rows += [[*map(str, key), *(cells[key].get(task, "") for task in tasks)] for key in order]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw_frontier(path, lines):
    """PSNR and SSIM against network evaluations: a column a task, a line a method."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(3.2 * len(tasks) + 1.2, 5), layout="constrained", dpi=100)
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    for column, task in zip(axes.T, tasks, strict=True):
        for axis in column:
            axis.set_prop_cycle(color=colormaps["tab20"].colors)  # more methods than usual colours
        column[0].set_title(task)
        column[1].set_xlabel("network evaluations")
        for name in dict.fromkeys(label(line) for line in lines):
            part = [line for line in lines if (line["task"], label(line)) == (task, name)]
            steps = [evaluations(line) for line in part]
            for axis, metric in zip(column, ("psnr", "ssim"), strict=True):
                values = [line[metric] for line in part]
                axis.plot(steps, values, marker="o", markersize=3, label=name)
                axis.set_xscale("log")
                axis.grid(alpha=0.3)
        for axis, metric, depth in zip(column, ("psnr", "ssim"), (8, 0.5), strict=True):
            best = max(line[metric] for line in lines if line["task"] == task)
            axis.set_ylim(best - depth, best + depth / 20)  # what fails would hide the others
    axes[0][0].set_ylabel("PSNR (dB)")
    axes[1][0].set_ylabel("SSIM")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def main(argv=None):
    return comparison.report(parse_args(argv), compare)


if __name__ == "__main__":
    sys.exit(main())
