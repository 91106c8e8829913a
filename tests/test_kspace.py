"""Raw k-space: made ready, restored and written; and what is refused."""

import csv
import glob

import h5py
import nibabel
import numpy as np
import pytest
import torch

import main
from data.kspace_output import fastmri_metrics
from guided_diffusion.intervals import factors_path, save_factors
from guided_diffusion.operators.coils import birdcage_maps
from guided_diffusion.operators.fourier import fft2c
from guided_diffusion.prior import load_prior
from tests.conftest import TINY, write_yaml
from tests.kspace_scans import HEADER, head, ifft, lines, oversampled, write_fastmri
from util.image_files import read_png


@pytest.fixture
def prior(tmp_path, monkeypatch):
    """An untrained network: what is written and said does not depend on it."""
    monkeypatch.chdir(tmp_path)
    write_yaml("model.yaml", {**TINY, "model_path": ""})
    return ["--model_config", "model.yaml", "--save_dir", "out"]


def task(root, **changed):
    config = {
        "conditioning": {"method": "dmps"},
        "data": {"root": root},
        "measurement": {
            "operator": {"name": "mri", "acceleration": 3, "center_fraction": 0.25},
            "noise": {"name": "gaussian", "sigma": "auto"},
        },
    }
    for key, value in changed.items():
        part = config
        *parents, last = key.split("__")
        for parent in parents:
            part = part[parent]
        part[last] = value
    write_yaml("task.yaml", config)
    return ["--task_config", "task.yaml", "--diffusion_config"]


def points(height=48, width=40, seed=0):
    """Six points in ten, and the centre."""
    mask = np.random.default_rng(seed).random((height, width)) < 0.6
    mask[height // 2 - 6 : height // 2 + 6, width // 2 - 6 : width // 2 + 6] = True
    return mask


FAST = "configs/diffusion_config_fast.yaml"


class TestRuns:
    folder = "out/untrained/mri/equispaced_fraction_R3/auto"
    measured = "out/untrained/mri/measured/auto"

    def test_complete_files_are_undersampled_and_compared(self, prior):
        k, u = head(slices=2)
        write_fastmri("scan.h5", oversampled(k, 96), HEADER, reference=None)
        assert main.main([*prior, *task("scan.h5"), FAST]) == 0
        with h5py.File(f"{self.folder}/recon/scan.h5") as file:
            found = file["reconstruction"][()]
        assert found.shape == (2, 48, 36) and found.dtype == np.float32
        image = nibabel.load(f"{self.folder}/volumes/scan.nii.gz")
        assert image.shape == (36, 48, 2)
        assert image.header.get_zooms() == (5.0, 4.0, 5.0)
        with open(f"{self.folder}/fastmri.csv") as file:
            (row,) = csv.DictReader(file)
        truth = np.sqrt((np.abs(ifft(k)) ** 2).sum(1))[..., 2:38]
        expected = fastmri_metrics(found, truth)
        assert float(row["fastmri_nmse"]) == pytest.approx(expected["fastmri_nmse"], rel=1e-3)
        mask = np.load(f"{self.folder}/mask/scan_z000.npy")
        assert mask.shape == (40,) and mask.sum() < 20
        shown = read_png(f"{self.folder}/truth/scan_z001.png")[0]
        white = np.percentile(np.sqrt((np.abs(ifft(k)) ** 2).sum(1)), 99.9)
        inside = u[1] > 0
        assert np.abs((shown + 1) / 2 - u[1] / white)[inside].mean() < 0.01

    def test_a_reference_of_more_columns_than_kspace_is_compared_at_the_centre(self, prior):
        k, _ = head(slices=2)
        truth = np.sqrt((np.abs(ifft(k)) ** 2).sum(1))
        reference = np.pad(truth, ((0, 0), (0, 0), (2, 2)), constant_values=9.0)
        write_fastmri("scan.h5", k, HEADER.replace("<y>36</y>", "<y>44</y>"), reference=reference)
        assert main.main([*prior, *task("scan.h5"), FAST, "--output", "r.h5"]) == 0
        with h5py.File("r.h5") as file:
            found = file["reconstruction"][()].astype(np.float64)
        with open(f"{self.folder}/fastmri.csv") as file:
            (row,) = csv.DictReader(file)
        nmse = np.sum((found - truth) ** 2) / np.sum(truth**2)
        psnr = 10 * np.log10(truth.max() ** 2 / np.mean((found - truth) ** 2))
        assert float(row["fastmri_nmse"]) == pytest.approx(nmse, rel=1e-3)
        assert float(row["fastmri_psnr"]) == pytest.approx(psnr, rel=1e-3)

    def test_the_report_has_the_headers_voxels(self, prior):
        write_fastmri("scan.h5", oversampled(head(slices=2)[0], 96), HEADER)
        assert main.main([*prior, *task("scan.h5"), FAST]) == 0
        with open(f"{self.folder}/report.html", encoding="utf-8") as file:
            assert "2 slices, pixels of 4 mm, 5 mm apart" in file.read()

    def test_measured_coils_are_known_again_and_changed_ones_are_not(self, prior, capsys):
        """What is shown of them is combined by maps; what is read, by the sum of squares."""
        k, _ = head(slices=2)
        write_fastmri("scan.h5", k * lines(), mask=lines())
        command = [*prior, *task("scan.h5"), FAST, "--measured", "--method", "ddrm"]
        assert main.main(command) == 0
        assert main.main(command) == 0
        assert "2 of 2 images had been restored by an earlier run" in capsys.readouterr().out
        k[:, 0] *= 1j  # of which the sum of squares tells nothing
        write_fastmri("scan.h5", k * lines(), mask=lines())
        assert main.main(command) == 0
        assert "had been restored" not in capsys.readouterr().out

    @pytest.mark.parametrize("complete", [True, False])
    def test_what_is_brighter_than_white_keeps_its_brightness(self, prior, complete):
        """A vessel three times as bright as white; all lines are measured, with little noise."""
        k, u = head(slices=2)
        image = np.zeros_like(ifft(k))
        image[0, :, 20:22, 20] = (
            3 * np.percentile(u, 99.9) * birdcage_maps(4, 48, 40).numpy()[:, 20:22, 20]
        )
        k = (k + fft2c(torch.from_numpy(image)).numpy()).astype(np.complex64)
        write_fastmri("scan.h5", k)
        operator = {"name": "mri", "acceleration": 1, "center_fraction": 1.0}
        options = [] if complete else ["--measured"]
        config = task("scan.h5", measurement__operator=operator)
        assert main.main([*prior, *options, *config, FAST]) == 0
        [path] = glob.glob("out/untrained/mri/*/auto/recon/scan.h5")
        with h5py.File(path) as file:
            found = file["reconstruction"][()]
        truth = np.sqrt((np.abs(ifft(k)) ** 2).sum(1))
        assert truth.max() > 3 * np.percentile(truth, 99.9)
        np.testing.assert_allclose(found[0, 20:22, 20], truth[0, 20:22, 20], rtol=0.05)

    def test_undersampled_files_are_restored_as_they_are(self, prior, capfd):
        k, u = head(slices=1)
        write_fastmri("scan.h5", k * lines(), mask=lines())
        assert main.main([*prior, "--measured", *task("scan.h5"), FAST]) == 0
        assert "20 of 40 lines of k-space are measured: acceleration 2" in capfd.readouterr().err
        assert np.array_equal(np.load(f"{self.measured}/mask/scan_z000.npy"), lines())

    def test_the_noise_that_was_measured_is_told(self, prior, capfd):
        """Of each of k-space's two parts, in units of the [-1, 1] image; white is 2 above black."""
        k, _ = head(sigma=0.04)
        write_fastmri("scan.h5", k * lines(), mask=lines())
        assert main.main([*prior, *task("scan.h5"), FAST, "--measured"]) == 0
        with open(f"{self.measured}/metrics.csv") as file:
            (row,) = csv.DictReader(file)
        zero_filled = np.sqrt((np.abs(ifft(k * lines())) ** 2).sum(1))
        expected = 0.04 * 2 / np.percentile(zero_filled, 99.9)
        assert float(row["sigma"]) == pytest.approx(expected, rel=0.15)
        assert f"sigma {float(row['sigma']):.3g}" in capfd.readouterr().out
        with open(f"{self.measured}/report.html", encoding="utf-8") as file:
            assert "never saw so little noise" not in file.read()

    def test_points_are_restored_as_they_were_measured(self, prior, capfd):
        k, _ = head()
        np.save("scan.npy", k[0] * points())
        assert main.main([*prior, "--measured", *task("scan.npy"), FAST]) == 0
        said = f"{points().sum()} of 1920 points of k-space are measured: acceleration 1.5"
        assert said in capfd.readouterr().err
        assert np.array_equal(np.load(f"{self.measured}/mask/scan_z000.npy"), points())
        picture = read_png(f"{self.measured}/mask/scan_z000.png")[0]
        assert np.array_equal(picture > 0, points())

    @pytest.mark.parametrize("coils", [1, 4])
    def test_complete_files_are_undersampled_by_points(self, prior, coils):
        k, _ = head(coils=coils)
        write_fastmri("scan.h5", k)
        operator = {"name": "mri", "mask": "poisson", "acceleration": 3, "center_fraction": 0.3}
        config = task("scan.h5", measurement__operator=operator)
        assert main.main([*prior, *config, FAST]) == 0
        mask = np.load("out/untrained/mri/poisson_R3/auto/mask/scan_z000.npy")
        assert mask.shape == (48, 40) and mask.sum() == 640

    @pytest.mark.parametrize("method", ["dmps", "diffpir", "pigdm", "dps", "spectral_sample"])
    def test_points_of_images(self, prior, method):
        """Of a size that is not the prior's, by a mask in a file, in every method that can."""
        np.save("mask.npy", points())
        np.save("image.npy", np.random.default_rng(0).random((48, 40)).astype(np.float32))
        operator = {"name": "mri", "mask": "mask.npy", "coils": 3}
        config = task(
            "image.npy",
            conditioning__method=method,
            measurement__operator=operator,
            measurement__noise__sigma=0.1,
        )
        write_yaml("steps.yaml", {"steps": 1000, "timestep_respacing": "2", "clip_denoised": True})
        assert main.main([*prior, *config, "steps.yaml"]) == 0

    @pytest.mark.parametrize("method", ["ddrm", "ddnm", "diffpir", "pigdm", "dps", "dmps"])
    def test_every_method(self, prior, method):
        k, _ = head()
        np.save("scan.npy", k[0])
        config = task("scan.npy", data__order="coil kx ky", conditioning__method=method)
        write_yaml("steps.yaml", {"steps": 1000, "timestep_respacing": "2", "clip_denoised": True})
        assert main.main([*prior, *config, "steps.yaml"]) == 0

    @pytest.mark.parametrize("factor", [1, 1.5])
    def test_samples_have_a_spread_in_the_scans_units(self, prior, factor):
        k, _ = head()
        if factor > 1:
            loaded = load_prior("model.yaml", "cpu")
            path = factors_path(loaded.config.model_path)
            save_factors(loaded, {"spectral": {"mri": factor}}, "a test", path)
        write_fastmri("scan.h5", k)
        options = [*prior, "--num_samples", "2", *task("scan.h5"), FAST]
        assert main.main(options) == 0
        std = nibabel.load(f"{self.folder}/std/scan.nii.gz").get_fdata()
        assert std.shape == (40, 48, 1) and std.max() > 0
        low, high = np.load(f"{self.folder}/interval/scan_z000.npy")
        samples = [read_png(f"{self.folder}/samples/scan_z000_{i}.png") for i in range(2)]
        spread = np.abs(samples[0] - samples[1]) / np.sqrt(2)
        inside = (low > -1) & (high < 1) & (np.abs(samples[0]) < 1) & (np.abs(samples[1]) < 1)
        t = 6.3138  # Student's, of one degree of freedom, 95 %
        width = factor * 2 * t * np.sqrt(1.5) * spread
        assert inside.sum() > 20
        assert np.allclose((high - low)[inside], width[inside], atol=0.15 * factor)
        shown = read_png(f"{self.folder}/interval/scan_z000_high.png")
        assert np.allclose(shown[0], high[0].clip(max=1), atol=0.005)
        restored = np.load(f"{self.folder}/slices/scan_z000.npy")
        assert (low <= restored).all() and (restored <= high).all() and restored.max() > 1
        assert np.allclose((high - restored)[inside], width[inside] / 2, atol=0.08 * factor)

    @pytest.mark.parametrize("order, axis", [("coil kx ky", -2), ("coil ky kx", -1)])
    def test_the_mask_is_a_picture_of_k_space(self, prior, order, axis):
        k, _ = head()
        np.save("scan.npy", k[0])
        assert main.main([*prior, *task("scan.npy", data__order=order), FAST]) == 0
        mask = np.load(f"{self.folder}/mask/scan_z000.npy")
        picture = read_png(f"{self.folder}/mask/scan_z000.png")[0]
        assert picture.shape == (48, 40)
        assert np.array_equal(picture > 0, np.broadcast_to(np.expand_dims(mask, axis), (48, 40)))

    def test_a_readout_filled_up_with_zeros(self, prior):
        """Of the lines that the task takes, the points that the file has."""
        k, _ = head(64, 48)
        k[..., :4] = k[..., -4:] = 0
        np.save("scan.npy", k[0])
        assert main.main([*prior, *task("scan.npy", data__order="coil ky kx"), FAST]) == 0
        mask = np.load(f"{self.folder}/mask/scan_z000.npy")
        assert mask.shape == (64, 48) and not mask[:, :4].any() and not mask[:, -4:].any()
        assert (mask[:, 4:-4] == mask[:, 24:25]).all() and 16 <= mask[:, 24].sum() <= 27

    def test_no_noise(self, prior):
        """σ = 0 is taken for little noise where equations are solved, as for images."""
        k, u = head(sigma=0.0)
        write_fastmri("scan.h5", k)
        assert main.main([*prior, "--sigma", "0", *task("scan.h5"), FAST]) == 0
        [path] = glob.glob("out/untrained/mri/*/*/recon/scan.h5")
        with h5py.File(path) as file:
            assert np.isfinite(file["reconstruction"][()]).all()

    def test_one_coil(self, prior):
        k, _ = head(coils=1)
        write_fastmri("scan.h5", k[:, 0])
        assert main.main([*prior, *task("scan.h5"), FAST]) == 0
        with h5py.File(f"{self.folder}/recon/scan.h5") as file:
            assert file["reconstruction"].shape == (1, 48, 40)


class TestRefused:
    """One sentence and status 2."""

    def refused(self, capfd, options):
        assert main.main(options) == 2
        errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error")]
        return errors[0]

    def test_no_calibration_centre(self, prior, capfd):
        k, _ = head()
        write_fastmri("scan.h5", k * (np.arange(40) % 4 == 0))
        error = self.refused(capfd, [*prior, "--measured", *task("scan.h5"), FAST])
        assert "1 lines about the centre of k-space" in error

    def test_a_mask_of_another_width(self, prior, capfd):
        k, _ = head()
        write_fastmri("scan.h5", k)
        np.save("mask.npy", np.ones(32))
        config = task("scan.h5", measurement__operator__mask="mask.npy")
        error = self.refused(capfd, [*prior, *config, FAST])
        assert "mask.npy: 32 lines, and k-space has" in error

    @pytest.mark.parametrize("shape, said", [((32,), "32 lines"), ((32, 40), "32×40 points")])
    def test_a_files_own_mask_of_another_size(self, prior, capfd, shape, said):
        k, _ = head()
        write_fastmri("scan.h5", k, mask=np.ones(shape))
        assert f"mask: {said}" in self.refused(capfd, [*prior, *task("scan.h5"), FAST])

    def test_nan(self, prior, capfd):
        k, _ = head()
        k[0, 0, 3, 3] = np.nan
        write_fastmri("scan.h5", k)
        assert "not finite" in self.refused(capfd, [*prior, *task("scan.h5"), FAST])

    def test_no_kspace(self, prior, capfd):
        with h5py.File("scan.h5", "w") as file:
            file["image"] = np.ones((4, 4))
        error = self.refused(capfd, [*prior, *task("scan.h5"), FAST])
        assert "no dataset 'kspace' in it (it holds image)" in error

    @pytest.mark.parametrize("acceleration", [0.5, 0, "x"])
    def test_acceleration(self, prior, capfd, acceleration):
        k, _ = head()
        write_fastmri("scan.h5", k)
        config = task("scan.h5", measurement__operator__acceleration=acceleration)
        assert "acceleration: expected" in self.refused(capfd, [*prior, *config, FAST])

    def test_more_centre_lines_than_lines(self, prior, capfd):
        k, _ = head()
        write_fastmri("scan.h5", k)
        config = task("scan.h5", measurement__operator__center_fraction=0.6)
        assert "center_fraction: 0.6" in self.refused(capfd, [*prior, *config, FAST])

    def test_a_complete_file_that_is_not(self, prior, capfd):
        k, _ = head()
        write_fastmri("scan.h5", k * lines())
        error = self.refused(capfd, [*prior, *task("scan.h5"), FAST])
        assert "lines of k-space are empty" in error and "--measured" in error

    def test_points_that_were_measured_cannot_be_undersampled(self, prior, capfd):
        k, _ = head()
        np.save("scan.npy", k[0] * points())
        error = self.refused(capfd, [*prior, *task("scan.npy"), FAST])
        assert "points of k-space are empty" in error and "--measured" in error

    def test_methods_that_need_an_svd(self, prior, capfd):
        """Said at the door where the task has the points, otherwise when the scan is read."""
        k, _ = head()
        np.save("scan.npy", k[0] * points())
        config = task("scan.npy", conditioning__method="ddnm")
        said = "ddnm needs A's singular value decomposition"
        assert main.main([*prior, "--measured", *config, "configs/diffusion_config_100.yaml"]) != 0
        assert said in capfd.readouterr().err
        operator = {"name": "mri", "mask": "poisson", "coils": 4}
        np.save("scan.npy", np.zeros((48, 40), np.float32))
        config = task(
            "scan.npy",
            conditioning__method="ddnm",
            measurement__operator=operator,
            measurement__noise__sigma=0.1,
        )
        error = self.refused(capfd, [*prior, *config, "configs/diffusion_config_100.yaml"])
        assert said in error and "dmps, dps, pigdm, diffpir, spectral" in error

    @pytest.mark.parametrize("order", ["coil ky", "coil ky ky", "coil kx kz", "ky kx coil slice"])
    def test_order(self, prior, capfd, order):
        k, _ = head()
        np.save("scan.npy", k[0])
        config = task("scan.npy", data__order=order)
        assert "data.order: " in self.refused(capfd, [*prior, *config, FAST])

    @pytest.mark.parametrize("size", [(6, 6), (10, 10), (8, 64), (64, 12)])
    def test_too_small(self, prior, capfd, size):
        write_fastmri("scan.h5", head(*size)[0])
        said = self.refused(capfd, [*prior, *task("scan.h5"), FAST])
        assert f"{size[1]}×{size[0]} samples of k-space, and the" in said

    @pytest.mark.parametrize("given", ["rows", "columns"])
    def test_another_axis_than_the_files(self, prior, capfd, given):
        found = {"rows": "columns", "columns": "rows"}[given]
        np.save("scan.npy", head()[0][0])
        order = "coil kx ky" if found == "columns" else "coil ky kx"
        config = task("scan.npy", measurement__operator__axis=given, data__order=order)
        said = self.refused(capfd, [*prior, *config, FAST])
        assert f"axis: {given}, and the file has {found}" in said

    def test_another_operator(self, prior, capfd):
        k, _ = head()
        write_fastmri("scan.h5", k)
        config = task("scan.h5", measurement__operator={"name": "denoise"})
        config = [*prior, "--measured", *config, FAST]
        assert "holds k-space" in self.refused(capfd, config)

    def test_images_are_no_kspace(self, prior, capfd):
        np.save("image.npy", np.random.default_rng(0).random((48, 40)).astype(np.float32))
        config = [*prior, "--measured", *task("image.npy"), FAST]
        assert "an image, and operator mri restores k-space" in self.refused(capfd, config)
        error = self.refused(capfd, [*prior, *task("image.npy"), FAST])
        assert "sigma: auto measures the noise of k-space" in error


def test_fastmri_metrics_by_hand():
    """SSIM, PSNR and NMSE of a volume, written out: uniform 7×7 windows, unbiased covariances."""
    random = np.random.default_rng(0)
    truth, x = random.random((2, 2, 9, 8))
    found = fastmri_metrics(x, truth)
    top = truth.max()
    error = ((x - truth) ** 2).mean()
    assert found["fastmri_psnr"] == pytest.approx(10 * np.log10(top**2 / error))
    assert found["fastmri_nmse"] == pytest.approx(((x - truth) ** 2).sum() / (truth**2).sum())
    values = []
    for a, b in zip(truth, x, strict=True):
        for i in range(3):
            for j in range(2):
                p, q = a[i : i + 7, j : j + 7].ravel(), b[i : i + 7, j : j + 7].ravel()
                c = np.cov(p, q)
                c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
                mean = (2 * p.mean() * q.mean() + c1) / (p.mean() ** 2 + q.mean() ** 2 + c1)
                values.append(mean * (2 * c[0, 1] + c2) / (c[0, 0] + c[1, 1] + c2))
    assert found["fastmri_ssim"] == pytest.approx(np.mean(values))
