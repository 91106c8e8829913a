"""The benchmarks: what is measured, resumed, tuned, and shown on the pages."""

import csv
import hashlib
import os

import pytest

from guided_diffusion.methods import METHODS, start
from guided_diffusion.methods.dmps import DMPS
from tests.benchmarks import comparison, parts, planning, report, rows, run_all, settings, tables
from tests.benchmarks.settings import Job, label
from tests.benchmarks.tuned import CHOICE, sweep, tuned
from tests.conftest import SR, task, write_yaml
from util.metrics import METRICS, Metric

SMALL = {"scale": 3, "spacing": "even"}


@pytest.fixture
def small(tiny_run, monkeypatch, tmp_path):
    """Parts of a few jobs on the three images of `tiny_run`; the CSVs are in out/."""
    monkeypatch.setattr(rows, "FOLDER", str(tmp_path / "out"))
    everything = settings.SETS["val"]._replace(first=0, every=1)
    monkeypatch.setitem(settings.SETS, "val", everything)
    monkeypatch.setitem(settings.SETS, "tuning", everything)

    def frontier(choice):
        return [Job("val", name, "dmps", SMALL, 4) for name in ("sr4", "denoise")]

    monkeypatch.setitem(parts.PARTS, "frontier", (frontier,))
    return tiny_run


def run(*arguments):
    base = ["--val", "images", "--model_config", "model.yaml", "--precision", "fp32"]
    return run_all.main([*base, *arguments])


def written(part="frontier"):
    with open(os.path.join(rows.FOLDER, f"{part}.csv"), encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def restored(monkeypatch):
    """The jobs and images that are restored, as they come."""
    found, estimate = [], comparison.estimate

    def counted(job, image, prior):
        found.append((job.task, image.name))
        return estimate(job, image, prior)

    monkeypatch.setattr(comparison, "estimate", counted)
    return found


def test_a_row_is_what_main_py_restores(small):
    assert run("--part", "frontier", "--tasks", "sr4") == 0
    found = {row["image"]: row for row in written()}
    write_yaml("diffusion.yaml", vars(comparison.schedule_of("dmps")) | {"timestep_respacing": 4})
    write_yaml("task.yaml", task(conditioning={"method": "dmps", "params": {"scale": 3}}))
    assert small() == 0
    with open(f"results/{SR}/metrics.csv", encoding="utf-8") as file:
        expected = {row["image"]: row for row in csv.DictReader(file)}
    assert set(found) == set(expected) and len(found) == 3
    for name, row in found.items():
        assert row["evaluations"] == "4" and row["setting"] == "scale 3, spacing even"
        for metric in ("psnr", "ssim", "nmse"):
            assert float(row[metric]) == pytest.approx(float(expected[name][metric]), abs=1e-3)
        assert 0 < float(row["haarpsi"]) < 1 and float(row["hf_ratio"]) > 0


def test_evaluations_are_counted_not_steps(small, monkeypatch):
    """Denoising by spectral has one step, in which the network sees both reflections."""
    job = Job("val", "denoise", "spectral", {"kappa": 2}, 4)
    monkeypatch.setitem(parts.PARTS, "frontier", (lambda choice: [job],))
    assert run("--part", "frontier", "--limit", "1") == 0
    (row,) = written()
    assert (row["steps"], row["evaluations"]) == ("4", "2")


def test_it_resumes_and_measures_anew_only_what_is_stale(small, restored):
    assert run("--part", "frontier", "--tasks", "sr4", "--limit", "2") == 0
    assert len(restored) == 2
    path = os.path.join(rows.FOLDER, "frontier.csv")
    with open(path, "a", encoding="utf-8") as file:
        file.write("val,sr4,dmps,half a r")  # a stop amid a row
    assert run("--part", "frontier") == 0
    assert len(restored) == 6 and len(set(restored)) == 6
    assert run("--part", "frontier") == 0
    assert len(restored) == 6 and len(written()) == 6
    assert run("--part", "frontier", "--tasks", "denoise", "--again") == 0
    assert len(restored) == 9 and len(written()) == 6

    stale = [{**row, "prior": "another"} for row in written()]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows.columns())
        writer.writeheader()
        writer.writerows(stale)
    assert run("--part", "frontier") == 0
    assert len(restored) == 15 and {row["prior"] for row in written()} != {"another"}
    assert len(written()) == 6


def test_a_new_metric_joins_the_columns_and_a_column_that_is_not_known_stays(
    small, restored, monkeypatch
):
    assert run("--part", "frontier", "--tasks", "sr4", "--limit", "2") == 0
    before = [{**row, "scanner": "A"} for row in written()]
    with open(os.path.join(rows.FOLDER, "frontier.csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, before[0])
        writer.writeheader()
        writer.writerows(before)
    error = Metric(label="Error", function=lambda x, truth, mask=None: float((x - truth).mean()))
    monkeypatch.setitem(METRICS, "error", error)
    assert run("--part", "frontier", "--tasks", "sr4") == 0
    assert len(restored) == 3
    old, new = written()[:2], written()[2]
    assert [{**row, "error": ""} for row in before] == old
    assert new["scanner"] == "" and float(new["error"]) != 0


def test_rows_of_another_prior_are_dropped_whatever_is_measured(small, restored):
    os.makedirs(rows.FOLDER)
    add_rows({"scale 1": {"a": 30.0}}, "val", 20, "dmps")  # of a prior called x
    table = rows.Rows(rows.path_of("tuning"))
    table.add(("tuning", "sr4", "bicubic", "", "0", "a"), {"psnr": 20.0, "prior": ""})
    assert run("--part", "frontier", "--tasks", "sr4", "--limit", "1") == 0
    assert {row["prior"] for row in written()} == {written()[0]["prior"]} != {"x"}
    assert len(written("tuning")) == 1


def test_what_another_part_has_measured_is_not_measured_again(small, restored, monkeypatch):
    assert run("--part", "frontier") == 0
    monkeypatch.setitem(parts.PARTS, "shipped", parts.PARTS["frontier"])
    assert run("--part", "shipped") == 0
    assert len(restored) == 6


def test_the_plan_is_evaluations_times_seconds(small, restored, monkeypatch, capsys):
    monkeypatch.setattr(planning.Speed, "seconds", lambda self, gradient: 40 if gradient else 10)
    assert run("--part", "frontier", "--plan") == 0
    assert "frontier: 6 images to restore, 24 network evaluations, at most 0 h 04 min" in (
        capsys.readouterr().out
    )

    def part(choice):
        mean = {"kappa": 1, "samples": 8}
        return [Job("val", "sr4", "dps", {}, 5), Job("val", "sr4", "spectral_sample", mean, 5)]

    monkeypatch.setitem(parts.PARTS, "frontier", (part,))
    assert run("--part", "frontier", "--plan") == 0
    assert "6 images to restore, 135 network evaluations, at most 0 h 30 min" in (
        capsys.readouterr().out
    )
    assert not restored and not os.path.exists(os.path.join(rows.FOLDER, "frontier.csv"))


def test_a_mean_of_samples_has_its_calibration(small, monkeypatch):
    def part(choice):
        setting = {"kappa": 1, "sample_finish": 0.1, "samples": 2}
        return [Job("val", "sr4", "spectral_sample", setting, 3)]

    monkeypatch.setitem(parts.PARTS, "calibration", (part,))
    assert run("--part", "calibration", "--limit", "1") == 0
    (row,) = written("calibration")
    assert 0 <= float(row["in_50"]) <= float(row["in_90"]) <= 1 and float(row["rescale"]) > 0


def add_rows(figures, chosen="tuning", steps=20, method="ddrm", name="sr4"):
    """Rows of a part as if measured: label of a setting → PSNR of each image."""
    table = rows.Rows(rows.path_of("tuning" if chosen == "tuning" else "frontier"))
    for setting, values in figures.items():
        for image, psnr in values.items():
            key = (chosen, name, method, setting, str(steps), image)
            other = {"ssim": 0.5, "haarpsi": 0.5, "nmse": 0.1, "hf_ratio": 1.0}
            table.add(key, {"psnr": psnr, **other, "evaluations": steps, "prior": "x"})


def test_tuned_is_the_best_mean_over_the_slices_that_all_settings_have(small):
    os.makedirs(rows.FOLDER)
    labels = [label(s) for s in settings.compared("ddrm").grid]
    add_rows({name: {"a": 30.0, "b": 20.0} for name in labels[1:]})
    assert tuned("ddrm", "sr4", 20) is None  # one setting is missing
    add_rows({labels[0]: {"a": 31.0}})
    add_rows({labels[2]: {"b": 50.0}})
    assert label(tuned("ddrm", "sr4", 20)) == labels[0]  # on "a", which all have
    assert label(tuned("ddrm", "sr4", 5)) == labels[0]
    assert tuned("ddrm", "sr4", 100) is None and tuned("ddrm", "denoise", 20) is None
    add_rows({labels[0]: {"b": 10.0}})
    assert label(tuned("ddrm", "sr4", 20)) == labels[2]
    assert sweep("ddrm", "sr4", 20).tried[labels[2]]["psnr"] == 40
    job = Job("val", "sr4", "ddrm", settings.compared("ddrm").grid[2], 20)
    assert job in parts.frontier(CHOICE)


def test_slices_for_tuning_and_reporting_are_apart_and_grids_of_one_size():
    sets = settings.SETS["val"], settings.SETS["tuning"]
    val, tuning = (set(range(s.first, 260, s.every)) for s in sets)
    assert val.isdisjoint(tuning) and len(val) == len(tuning) == 10
    assert sets[0].flag == sets[1].flag
    sizes = {name: len(settings.compared(name).grid) for name in settings.COMPARED}
    del sizes["ddnm"]
    assert set(sizes.values()) == {7}


@pytest.mark.parametrize(
    ("method", "steps", "params", "schedule"),
    [
        ("dmps", 20, {"scale": 1.75}, ("20", True, "learned_range")),
        ("dps", 100, {"scale": 0.3}, ("100", True, "learned_range")),
        ("ddrm", 20, {"eta": 0.85, "eta_b": 1}, ("ddim20", False, "fixed_small")),
        ("ddnm", 100, {"eta": 0.85}, ("ddim100", False, "fixed_small")),
        ("diffpir", 100, {"lambda_": 15, "zeta": 0.25}, ("quad100", True, "fixed_small")),
        ("pigdm", 100, {"eta": 1}, ("ddim100", False, "fixed_small")),
        ("spectral", 10, {"kappa": 2, "kappa_noise": 0.35}, ("logsnr10", "auto", "learned_range")),
    ],
)
def test_published_settings_are_those_of_the_programs(method, steps, params, schedule):
    job = Job("val", "sr4", method, settings.compared(method).published("sr4"), steps)
    found, config = comparison.resolve(job)
    assert found == params
    keys = ("timestep_respacing", "clip_denoised", "model_var_type")
    assert tuple(getattr(config, key) for key in keys) == schedule


def test_levels_are_changed_for_one_restoration_only(small):
    before = start.FINISH, start.WIDEST_STD
    with comparison.levels({"kappa": 1, "finish": 0.4, "widest": 6}):
        assert (start.FINISH, start.WIDEST_STD) == (0.4, 6)
    assert (start.FINISH, start.WIDEST_STD) == before


def test_the_shipped_levels_are_those_of_the_program():
    shipped = {k: v for name in ("spectral", "spectral_sample") for k, v in published(name).items()}
    for key, name in settings.LEVEL_KEYS.items():
        assert shipped[key] == getattr(start, name)


def published(name):
    return settings.compared(name).published("sr4")


def test_a_cell_is_a_mean_over_its_slices_and_says_of_how_many(small):
    os.makedirs(rows.FOLDER)
    one = label(settings.compared("ddrm").published("sr4"))
    add_rows({one: {"a": 30.0, "b": 31.0}}, "val", 20)
    add_rows({one: {"a": 32.0}}, "val", 100)
    (line,) = [x for x in tables.frontier("sr4").splitlines() if x.startswith("| ddrm, pub")]
    assert (
        line == "| ddrm, published |  |  | 30.50 / 0.500 / 0.500 |  | 32.00 / 0.500 / 0.500 (1) |"
    )
    ours = label(published("spectral"))
    for steps in (10, 20):
        add_rows({ours: {"a": 32.0 + steps, "b": 0.0}}, "val", steps, "spectral")
    (line,) = [x for x in tables.ahead("val").splitlines() if x.startswith("| ×4 | PSNR")]
    # at 100 it leads on "a" by 0 - 20, at 20 on both by 30.5 - 26
    lead = "-9.50 ± 21.50 (1 of 2) | -4.50 ± 26.50 (1 of 2)"  # of 12 and -31, 22 and -31
    assert line.startswith(
        f"| ×4 | PSNR (dB) | 21.00 | 26.00 | **30.50** | {lead} | ddrm, eta 0.85,"
    )
    assert line.endswith("20 evaluations |")


def test_the_denoiser_is_compared_source_by_source_on_the_same_slices(small, restored):
    os.makedirs("multi")
    os.rename("images", "multi/ixi_pd")
    assert run("--part", "denoiser", "--multi", "multi", "--val", "", "--methods", "spectral") == 0
    assert len(restored) == 6 and {row["evaluations"] for row in written("denoiser")} == {"2"}
    assert tables.denoiser() == tables.MISSING
    table = rows.Rows(rows.path_of("denoiser"))
    found = {row["image"]: float(row["psnr"]) for row in written("denoiser")[:3]}
    for image, lead in (("a1", 1.0), ("a10", 2.0)):
        key = ("ixi_pd", "denoise", "bm3d", "strength 1", "0", image)
        other = {"ssim": 0.5, "haarpsi": 0.5, "nmse": 0.1, "hf_ratio": 1.0}
        table.add(key, {"psnr": found[image] - lead, **other, "evaluations": 0})
    (line,) = [x for x in tables.denoiser().splitlines() if x.startswith("| ixi_pd | 2 |")]
    assert "| +1.50 |" in line


def test_a_new_method_is_in_the_frontier_with_its_defaults(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", type("Toy", (DMPS,), {"name": "toy"}))
    untuned = CHOICE._replace(best=lambda *_: None)
    jobs = [job for job in parts.frontier(untuned) if job.method == "toy"]
    assert {job.steps for job in jobs} == set(settings.STEPS)
    assert {label(job.setting) for job in jobs} == {"scale 1.75"}


@pytest.mark.parametrize("name", report.PAGES)
def test_the_pages_are_what_the_csvs_give(name):
    text = report.read(name)
    assert text.count("<!-- table ") == text.count("<!-- end of table -->") > 3
    assert report.page(text) == text, "run python tests/benchmarks/report.py"


def test_speed_and_precision_are_of_the_prior_that_ships():
    with open(os.path.join(settings.REPOSITORY, "models", "mri.pt"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    with open(os.path.join(rows.FOLDER, "speed", "machine.csv"), encoding="utf-8") as file:
        assert f"prior {digest[:8]}" in file.read(), "run python tests/benchmarks/speed.py"


@pytest.mark.parametrize("name", report.PLOTS)
def test_the_plots_are_of_the_csvs(name):
    lines, *_ = report.PLOTS[name]
    assert all(any(panel.values()) for panel in lines().values())  # none is empty
    path = os.path.join(settings.REPOSITORY, name)
    assert report.drawn(path) == report.digest(lines()), "run python tests/benchmarks/report.py"


def test_another_figure_changes_the_page():
    page = "<!-- table csv training/validation -->\nold\n<!-- end of table -->\nprose\n"
    made = report.page(page)
    assert "| updates |" in made and "old" not in made and made.endswith("prose\n")
    assert report.page(made) == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--val", "nowhere", "--part", "frontier"), "--val: no file or folder nowhere"),
        (("--model_config", "nowhere.yaml"), "nowhere.yaml"),
        (("--gpu", "99"), "there is no GPU 99"),
    ],
)
def test_errors_are_sentences(small, capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_csv_of_other_columns_is_refused(small, capsys):
    os.makedirs(rows.FOLDER)
    with open(rows.path_of("frontier"), "w", encoding="utf-8") as file:
        file.write("task,psnr\nsr4,30\n")
    assert run("--part", "frontier") == 2
    assert "frontier.csv: expected the columns set, task," in capsys.readouterr().err


def test_the_prior_must_be_grey(small, capsys):
    write_yaml("rgb.yaml", {"image_size": 32, "num_channels": 32, "num_res_blocks": 1,
                            "channel_mult": "1,1", "in_channels": 3, "model_path": ""})  # fmt: skip
    assert run("--model_config", "rgb.yaml") == 2
    assert "takes priors of one channel" in capsys.readouterr().err


def test_a_limit_takes_images_that_are_spread_over_the_set():
    class Images:
        def of(self, name):
            return [(str(i), None) for i in range(7)]

    jobs = [Job("val", "sr4", "dmps", SMALL, 4), Job("val", "sr4", "dmps", SMALL, 5, every=3)]

    def found(limit):
        return [(job.steps, name) for job, name, _ in run_all.units(jobs, Images(), limit)]

    assert found(2) == [(4, "0"), (4, "2"), (5, "0"), (5, "6")]
    assert found(5) == [
        (4, "0"),
        (4, "2"),
        (4, "4"),
        (4, "6"),
        (5, "0"),
        (5, "6"),
        (4, "1"),
        (5, "3"),
    ]
    assert sorted(found(None)) == sorted([(4, str(i)) for i in range(7)] + [(5, x) for x in "036"])
