"""Tuning by successive halving, processes that share the work, and the order of the parts."""

import os

import imageio.v3 as iio
import numpy as np
import pytest

from guided_diffusion.methods import METHODS
from tests.benchmarks import comparison, parts, report, rows, run_all, settings, sweeps, tables
from tests.benchmarks.settings import label
from tests.benchmarks.tuned import CHOICE, LATER, candidates, leaders, neighbours, sweep, tuned

GRID = settings.compared("ddrm").grid
LABELS = [label(s) for s in GRID]
PUBLISHED = label(settings.compared("ddrm").published("sr4"))  # one of the grid


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "FOLDER", str(tmp_path / "out"))
    os.makedirs(rows.FOLDER)


@pytest.fixture
def restored(tiny_run, folder, monkeypatch):
    """Five images; to measure one is only to note ((set, task, method, setting, steps), image)."""
    for name in ("b1", "b2"):
        iio.imwrite(f"images/{name}.png", np.full((32, 32), 90, np.uint8))
    for name in ("val", "tuning"):
        everything = settings.SETS[name]._replace(first=0, every=1)
        monkeypatch.setitem(settings.SETS, name, everything)
    found = []

    def one_row(job, name, truth, prior):
        found.append((rows.group_of(job), name))
        psnr = 30 + len(label(job.setting)) / 7 % 1 + len(name)  # any, and the same again
        figures = {"psnr": psnr, "ssim": psnr / 50, "haarpsi": 30 / psnr, "nmse": 0.1}
        of = {"evaluations": job.steps, "prior": comparison.digest_of(prior)}
        return figures | of | {"hf_ratio": 1.0}

    monkeypatch.setattr(run_all, "one_row", one_row)
    return found


def run(*arguments):
    base = ["--val", "images", "--model_config", "model.yaml", "--precision", "fp32"]
    return run_all.main([*base, *arguments])


def add(figures, images="abc", steps=20, method="ddrm", name="sr4"):
    """Rows of the sweep: label of a setting → (PSNR, SSIM, HaarPSI) on each image."""
    table = rows.Rows(rows.path_of("tuning"))
    for setting, values in figures.items():
        for image in images:
            measured = dict(zip(rows.HEADLINE, map(float, values), strict=True))
            key = ("tuning", name, method, setting, str(steps), image)
            table.add(key, measured | {"nmse": 0.1, "evaluations": steps, "prior": "x"})


def first_slices():
    """PSNR is best in setting 5, then 6; SSIM in 1, then 5; HaarPSI in 2, then 5."""
    values = {name: [30, 0.8, 0.7] for name in LABELS}
    values[LABELS[5]] = [35, 0.88, 0.78]
    values[LABELS[6]] = [34, 0.8, 0.7]
    values[LABELS[1]] = [31, 0.9, 0.7]
    values[LABELS[2]] = [29, 0.8, 0.8]
    return values


def test_only_the_leaders_of_each_measure_and_the_published_go_on(folder):
    assert PUBLISHED == LABELS[4]
    values = first_slices()
    add({name: values[name] for name in LABELS[:-1]})
    assert leaders("ddrm", "sr4", 20) == [] and tuned("ddrm", "sr4", 20) is None
    add({LABELS[-1]: values[LABELS[-1]]})
    led = {label(s) for s in leaders("ddrm", "sr4", 20)}
    assert led == {LABELS[i] for i in (1, 2, 4, 5, 6)}
    assert label(tuned("ddrm", "sr4", 20)) == LABELS[5]


def test_means_over_other_slices_never_compete(folder):
    """On the other slices, which are harder, all leaders fall below what was left before."""
    values = first_slices()
    add(values)
    later = {LABELS[i]: [20, 0.6, 0.5] for i in (1, 2, 4, 5)} | {LABELS[6]: [24, 0.6, 0.5]}
    add({name: later[name] for name in list(later)[:-1]}, "de")
    assert label(tuned("ddrm", "sr4", 20)) == LABELS[5]  # still by three: one has no others
    add({LABELS[6]: later[LABELS[6]]}, "de")
    assert label(tuned("ddrm", "sr4", 20)) == LABELS[6]  # (3·34 + 2·24)/5 beats (3·35 + 2·20)/5
    found = sweep("ddrm", "sr4", 20)
    assert found.led[LABELS[6]] == pytest.approx(
        {"psnr": 30, "ssim": 0.72, "haarpsi": 0.62, "images": 5}
    )
    assert found.tried[LABELS[0]]["images"] == 3 and LABELS[0] not in found.led
    page = tables.tuning("ddrm", "20").splitlines()
    assert page[0].startswith("| setting | ×4 (5 slices) |")
    (line,) = [x for x in page if x.startswith(f"| {LABELS[0]} |")]
    assert line.startswith(f"| {LABELS[0]} | -5.00 / -0.100 / -0.100 (3) |")
    (line,) = [x for x in page if x.startswith(f"| {LABELS[6]} |")]
    assert line.startswith(f"| {LABELS[6]} | **30.00** / 0.720 / 0.620 |")
    (line,) = [x for x in tables.settings_table().splitlines() if x.startswith("| ddrm, tuned")]
    assert line.startswith(f"| ddrm, tuned | 20 | {LABELS[6]} (5) |")


def test_at_a_hundred_only_winners_neighbours_and_the_published_are_tried(folder):
    assert candidates("ddrm", "sr4", 100) == list(settings.dict_of((GRID[4], *GRID)))
    values = first_slices()
    values[LABELS[1]][1] = 0.85  # SSIM and PSNR are now won by 5, HaarPSI by 2
    add(values)
    tried = {label(s) for s in candidates("ddrm", "sr4", 100)}
    assert tried == {LABELS[i] for i in (1, 2, 3, 4, 5)}
    assert len(candidates("ddrm", "denoise", 100)) == 7


def test_at_a_hundred_it_goes_on_past_what_is_best_there(folder):
    def tried():
        return {label(s) for s in candidates("ddrm", "sr4", 100)}

    values = {name: [30, 0.8, 0.7] for name in LABELS} | {LABELS[4]: [35, 0.9, 0.8]}
    add(values)
    near = {LABELS[i] for i in (3, 4, 5, 6)}  # to 0.85 of η: 0.7, 1, and the other η_b
    assert tried() == near
    add({name: values[name] for name in near - {LABELS[3]}}, steps=100)
    assert tried() == near and tuned("ddrm", "sr4", 100) is None
    add({LABELS[3]: [36, 0.8, 0.7]}, steps=100)
    assert tried() == near | {LABELS[2]} and tuned("ddrm", "sr4", 100) is None
    add({LABELS[2]: [35.5, 0.8, 0.7]}, steps=100)
    assert tried() == near | {LABELS[2]}
    assert label(tuned("ddrm", "sr4", 100)) == LABELS[3]


def test_a_neighbour_differs_in_one_parameter_by_one_value():
    etas = [s["eta"] for s in GRID]
    assert etas[3:] == [0.7, 0.85, 1, 0.85] and GRID[6]["eta_b"] == 0.85
    assert neighbours(GRID[4], list(GRID)) == [GRID[3], GRID[5], GRID[6]]
    assert neighbours(GRID[0], list(GRID)) == [GRID[1]]
    pigdm = list(settings.compared("pigdm").grid)
    clipped = [s for s in pigdm if s["clip"]]
    assert neighbours(clipped[0], pigdm) == [clipped[1], pigdm[2]]


def test_a_sweep_measures_the_first_slices_then_the_leaders(restored, capsys):
    chosen = ["--part", "tuning", "--methods", "ddrm", "--tasks", "sr4"]
    assert run(*chosen, "--plan") == 0
    # at most: 7 settings on 3 slices, and all 7 may lead, of five and at 100 of every second
    assert "tuning: 56 images to restore, 2800 network" in capsys.readouterr().out
    assert run(*chosen, "--steps", "20") == 0
    led = leaders("ddrm", "sr4", 20)
    first = [image for (*_, steps), image in restored[: 7 * 3]]
    assert len(set(first)) == 3 and len(restored) == 7 * 3 + len(led) * 2 < 7 * 5
    assert {group[3] for group, _ in restored[7 * 3 :]} == {label(s) for s in led}
    assert len(set(restored)) == len(restored)
    before = len(restored)
    assert run(*chosen) == 0
    at_hundred = restored[before:]
    assert {group[4] for group, _ in at_hundred} == {"100"}
    tried = candidates("ddrm", "sr4", 100)
    assert {group[3] for group, _ in at_hundred} == {label(s) for s in tried} and len(tried) < 7
    assert len(at_hundred) == len(tried) * 3  # of five, every second: three
    assert run(*chosen, "--again", "--steps", "20") == 0
    assert len(restored) == before + len(at_hundred) + before


def test_shares_are_apart_and_together_what_one_process_measures(restored, monkeypatch):
    chosen = ["--part", "headline", "tuning", "frontier", "--tasks", "sr4", "denoise"]
    chosen += ["--methods", "ddrm", "spectral", "--steps", "20"]
    one_row, other = run_all.one_row, []

    def beside(*unit):
        """The other process measures all of its own while this one is at its first image."""
        if not other:
            other.append(True)
            assert run(*chosen, "--share", "2/2") == 0
        return one_row(*unit)

    monkeypatch.setattr(run_all, "one_row", beside)
    assert run(*chosen, "--share", "1/2") == 0
    assert len(set(restored)) == len(restored)
    assert {name for name in os.listdir(rows.FOLDER) if name.endswith(".csv")} == {
        f"{part}.{share}.csv" for part in ("tuning", "frontier") for share in ("1of2", "2of2")
    }
    apart = (tables.frontier("sr4"), tables.tuning("ddrm", "20"), tables.settings_table())
    assert "ddrm, tuned" in apart[0]
    both = len(restored)
    assert run("--merge") == 0
    assert {n for n in os.listdir(rows.FOLDER) if n.endswith(".csv")} == {
        "tuning.csv",
        "frontier.csv",
    }
    assert apart == (tables.frontier("sr4"), tables.tuning("ddrm", "20"), tables.settings_table())
    merged = measured()
    monkeypatch.setattr(rows, "FOLDER", os.path.abspath("alone"))
    assert run(*chosen) == 0
    assert measured() == merged and len(restored) == 2 * both == 2 * len(merged)


def measured():
    """Every row but what it took."""
    found = [row for path in rows.paths() for row in rows.read(path)]
    return sorted(tuple(v for k, v in row.items() if k != "seconds") for row in found)


def test_no_two_processes_write_one_file(folder):
    one, two = rows.Share(1, 2), rows.Share(2, 2)
    with rows.held(None):
        for share in (None, one):
            with pytest.raises(rows.UserError, match="in use by process"), rows.held(share):
                pass
    with rows.held(one), rows.held(two):
        for share in (None, one):
            with pytest.raises(rows.UserError, match="in use by"), rows.held(share):
                pass
    with rows.held(None):
        pass


def test_shares_do_not_touch_rows_of_another_prior(restored, capsys):
    add({LABELS[0]: [30, 0.8, 0.7]})  # of a prior called x
    chosen = ["--part", "headline", "--methods", "spectral", "--tasks", "sr4"]
    assert run(*chosen, "--share", "1/1") == 2
    assert "has rows of another prior; --merge drops them" in capsys.readouterr().err
    assert run("--merge") == 0 and not restored
    assert run(*chosen, "--share", "1/1") == 0 and len(restored) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", "3/2"), "expected K/N, as in 1/2, found '3/2'"),
        (("--share", "half"), "expected K/N, as in 1/2, found 'half'"),
        (("--share", "1/2", "--again"), "--share: not with --again or --merge"),
    ],
)
def test_errors_are_sentences(restored, capsys, arguments, message):
    try:
        status = run(*arguments)
    except SystemExit as stop:  # of the parser
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1


def test_a_method_of_a_task_stays_in_one_process_and_the_work_is_halved():
    jobs = [job for part in ("tuning", "frontier") for s in parts.PARTS[part] for job in s(LATER)]
    owners = {}
    for job in jobs:
        owners.setdefault((job.task, job.method), set()).add(parts.share_of(job, 2))
    assert all(len(found) == 1 for found in owners.values())
    for method in METHODS:
        tasks = [owners[key] for key in owners if key[1] == method]
        assert sorted(min(found) for found in tasks) == [1, 1, 2, 2]


def test_what_most_readers_look_for_comes_first():
    assert {part for part, _ in parts.ORDER} == set(parts.PARTS) - {"deepinv", "own"}
    order = [part for part, _ in parts.ORDER]
    assert order[0] == "headline" and order.index("tuning") < order.index("frontier")
    jobs, frontier = parts.headline(CHOICE), parts.frontier(CHOICE)
    assert all(job in frontier for job in jobs)
    assert {(j.method, j.steps) for j in jobs[:8]} == {("spectral", 10), ("spectral", 20)}
    peers = set(METHODS) - {*settings.OURS, "ddnm"}
    assert {(j.method, j.steps) for j in jobs[8:]} == {
        *((name, steps) for name in peers for steps in (20, 100)),
        ("ddnm", 20),  # with noise DDRM itself
    }


def test_a_thousand_evaluations_are_asked_of_each_method_once_a_task():
    jobs = [job for job in parts.thousand(CHOICE) if job.steps == 1000]
    assert len(jobs) == len({(j.method, j.task) for j in jobs}) == 4 * (len(METHODS) - 1)
    assert all(j.setting == settings.compared(j.method).published(j.task) for j in jobs)
    assert all(len(range(10)[:: job.every]) == 3 for job in jobs)


def test_a_task_file_with_another_weight_than_the_tuned_is_noticed(folder, monkeypatch, capsys):
    assert comparison.shipped_scale("denoise_0.75") == comparison.shipped_scale("denoise")
    shipped = comparison.shipped_scale("gauss")
    better = shipped + 0.5

    known = {
        ("dmps", "sr4", 100): {"scale": comparison.shipped_scale("sr4")},
        ("dmps", "gauss", 100): {"scale": better},
    }
    monkeypatch.setattr(sweeps, "tuned", lambda *key: known.get(key))
    monkeypatch.setattr(sweeps, "chosen", lambda *_: "")
    (line,) = [x for x in tables.settings_table().splitlines() if x.startswith("| dmps, task")]
    marked = ["not the tuned one" in cell for cell in line.split("|")[3:7]]
    assert marked == [task == "gauss" for task in settings.TASKS]
    monkeypatch.setattr(report, "PAGES", ())
    monkeypatch.setattr(report, "PLOTS", {})
    assert report.main([]) == 0
    noticed = f"mri_deblur_gauss_config.yaml: scale {shipped:g}; on the tuning slices {better:g}"
    assert noticed in capsys.readouterr().out
