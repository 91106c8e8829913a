"""What a user gets wrong in files and flags: one sentence, exit status 2, nothing written."""

import os

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import write_yaml


def change(path, **keys):
    """A task or model YAML with keys replaced; a dotted key goes into depth, None removes."""

    def apply():
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
        for dotted, value in keys.items():
            *parents, last = dotted.split("__")
            place = config
            for parent in parents:
                place = place[parent]
            if value is None:
                del place[last]
            else:
                place[last] = value
        write_yaml(path, config)

    return apply


def write(path, data):
    def apply():
        with open(path, "wb") as file:
            file.write(data)

    return apply


class Exploit:
    def __reduce__(self):
        return (open, ("exploited", "w"))


def damage_checkpoint(kind):
    def apply():
        if kind == "truncated":
            os.truncate("tiny.pt", os.path.getsize("tiny.pt") // 2)
        elif kind == "code":
            torch.save({"w": Exploit()}, "tiny.pt")
        elif kind == "text":
            write("tiny.pt", b"no checkpoint")()
        elif kind == "list":
            torch.save([torch.zeros(1)], "tiny.pt")
        else:
            os.remove("tiny.pt")

    return apply


def empty_images():
    for name in os.listdir("images"):
        os.remove(f"images/{name}")


def double_names():
    np.save("images/a1.npy", np.zeros((32, 32), np.float32))


def method_that_is_replaced(name):
    """By that of the schedule."""

    def apply():
        change("diffusion.yaml", method="spectral")()
        with open("task.yaml", encoding="utf-8") as file:
            config = yaml.safe_load(file)
        write_yaml("task.yaml", {**config, "conditioning": {"method": name}})

    return apply


OPERATOR, NOISE = "measurement__operator__", "measurement__noise__"
BAD = {
    "missing yaml": (["--task_config", "none.yaml"], None, "none.yaml: no such file"),
    "broken yaml": ([], write("task.yaml", b"a: [1,\nb: 2"), "task.yaml: not valid YAML at line"),
    "yaml with code": ([], write("task.yaml", b"a: !!python/object/apply:os.getcwd []"), "YAML"),
    "binary yaml": ([], write("task.yaml", b"\xff\xfe\x00"), "task.yaml: not"),
    "impossible date": (
        [],
        write("task.yaml", b"a: 1\nb: 2024-13-45"),
        "task.yaml: not valid YAML at line 2 ('2024-13-45' cannot be read as timestamp)",
    ),
    "impossible tag": ([], write("task.yaml", b"a: !!bool maybe"), "'maybe' cannot be read as"),
    "yaml list": ([], write("task.yaml", b"- 1"), "expected keys and values"),
    "unknown key": ([], change("task.yaml", data__folder="x"), "unknown key 'folder'"),
    "missing key": ([], change("task.yaml", data__root=None), "missing key 'root'"),
    "missing section": ([], change("task.yaml", measurement=None), "missing key 'measurement'"),
    "empty section": (["--set", "data="], None, "data: expected keys and values, found nothing"),
    "another empty section": (
        ["--set", "measurement="],
        None,
        "task.yaml: measurement: expected keys and values, found nothing",
    ),
    "missing sigma": ([], change("task.yaml", **{NOISE + "sigma": None}), "missing key 'sigma'"),
    "wrong type": ([], change("task.yaml", **{NOISE + "sigma": "big"}), "sigma: expected a number"),
    "beyond floats": (
        [],
        change("task.yaml", **{NOISE + "sigma": 10**400}),
        "sigma: expected a number",
    ),
    "a parameter beyond floats": (
        [],
        change("task.yaml", **{OPERATOR + "singular_value_threshold": 10**400}),
        "singular_value_threshold: expected a number",
    ),
    "channels beyond floats": (
        [],
        change("model.yaml", channel_mult=[10**400]),
        "channel_mult: expected numbers",
    ),
    "bool for int": ([], change("model.yaml", num_channels=True), "expected an integer"),
    "unknown task": ([], change("task.yaml", **{OPERATOR + "name": "inpaint"}), "inpaint"),
    "unknown type": ([], change("task.yaml", **{OPERATOR + "type": "cubic"}), "cubic"),
    "auto when simulated": ([], change("task.yaml", **{NOISE + "sigma": "auto"}), "--measured"),
    "auto of poisson noise": (
        ["--measured"],
        change("task.yaml", **{NOISE + "name": "poisson", NOISE + "sigma": "auto"}),
        "gaussian or rician",
    ),
    "measured without images": (
        ["--measured", "--method", "vanilla"],
        None,
        "takes no images",
    ),
    "magnitude noise of k-space": (
        [],
        change("task.yaml", **{NOISE + "name": "rician", OPERATOR[:-2]: {"name": "mri"}}),
        "measurement.noise.name: k-space, which operator mri measures, has gaussian or clean noise",
    ),
    "unknown noise": ([], change("task.yaml", **{NOISE + "name": "salt"}), "salt"),
    "unknown method": ([], change("task.yaml", conditioning__method="x"), "conditioning.method"),
    "replaced method in capitals": (
        [],
        method_that_is_replaced("DMPS"),
        "task.yaml: conditioning.method: expected one of",
    ),
    "replaced method that is a number": ([], method_that_is_replaced(5), "vanilla, found 5"),
    "replaced method that is none": ([], method_that_is_replaced(None), "vanilla, found None"),
    "unknown method of a schedule": (
        [],
        change("diffusion.yaml", method="Spectral"),
        "diffusion.yaml: method: expected one of",
    ),
    "unknown sampler": ([], change("diffusion.yaml", sampler="euler"), "sampler"),
    "bad respacing": ([], change("diffusion.yaml", timestep_respacing=2000), "2000 of 1000"),
    "more steps than a section": (
        [],
        change("diffusion.yaml", timestep_respacing="10,600"),
        "600 of 500",
    ),
    "no stride": (
        [],
        change("diffusion.yaml", timestep_respacing="ddim2000"),
        "2000 steps of 1000",
    ),
    "no sections": ([], change("diffusion.yaml", timestep_respacing=[]), "timestep_respacing"),
    "too short a schedule": ([], change("diffusion.yaml", steps=20), "steps: the linear schedule"),
    "no steps": ([], change("diffusion.yaml", steps=0), "steps: expected at least 1, found 0"),
    "too long a schedule": (
        [],
        change("diffusion.yaml", steps=10**9),
        "steps: expected at most 100000, found 1000000000",
    ),
    "wrong factor": ([], change("task.yaml", **{OPERATOR + "scale_factor": 3}), "scale_factor"),
    "infinite blur": (
        [],
        change(
            "task.yaml",
            measurement__operator={"name": "deblur", "type": "aniso", "intensity": [1, np.inf]},
        ),
        "intensity: expected two positive numbers for aniso",
    ),
    "endless kernel": (
        [],
        change("task.yaml", measurement__operator={"name": "deblur", "kernel_size": 10**20}),
        "kernel_size: expected a number in [1, 4095]",
    ),
    "negative sigma": ([], change("task.yaml", **{NOISE + "sigma": -1.0}), "sigma"),
    "bad channels": ([], change("model.yaml", num_channels=40), "multiple of 32"),
    "negative size": ([], change("model.yaml", image_size=-1), "model.yaml: image_size: expected"),
    "no channels": ([], change("model.yaml", in_channels=-1), "model.yaml: in_channels: expected"),
    "endless channels": ([], change("model.yaml", in_channels=10**20), "at most 16384"),
    "other architecture": ([], change("model.yaml", num_res_blocks=2), "input_blocks"),
    "other width": ([], change("model.yaml", num_channels=64), "other shape"),
    "class_cond": ([], change("model.yaml", class_cond=True), "class_cond"),
    "missing checkpoint": ([], damage_checkpoint("missing"), "no checkpoint at tiny.pt"),
    "truncated checkpoint": ([], damage_checkpoint("truncated"), "truncated or damaged"),
    "checkpoint with code": ([], damage_checkpoint("code"), "holds pickled code"),
    "text as checkpoint": ([], damage_checkpoint("text"), "is not a PyTorch checkpoint"),
    "list as checkpoint": ([], damage_checkpoint("list"), "expected a state dict"),
    "missing data": ([], change("task.yaml", data__root="nowhere"), "no file or folder nowhere"),
    "empty data": ([], empty_images, "no image in images"),
    "double names": ([], double_names, "rename one"),
    "unwritable save_dir": (["--save_dir", "task.yaml"], None, "cannot write"),
    "no such GPU": (["--gpu", "99"], None, "no GPU 99"),
    "bad method": (["--method", "x"], None, "--method"),
    "no samples": (["--num_samples", "0"], None, "--num_samples"),
    "samples of no image": (["--method", "vanilla", "--num_samples", "2"], None, "--num_samples"),
    "method without a task": (
        ["--method", "dps"],
        write("task.yaml", b"conditioning: {method: vanilla}"),
        "task.yaml: missing key 'data'",
    ),
    "bad share": (
        [],
        change("task.yaml", conditioning={"method": "ddrm", "params": {"eta": 2}}),
        "conditioning.params.eta",
    ),
    "bad precision": (["--precision", "int8"], None, "--precision"),
    "bad batch size": (["--batch_size", "0"], None, "--batch_size"),
    "endless batch": (["--batch_size", "1" + 20 * "0"], None, "expected 1000000 or less"),
    "no number": (["--seed", "x"], None, "--seed"),
    "unknown flag": (["--fast"], None, "--fast"),
    "nothing is left of the operator": (
        [],
        change("task.yaml", **{OPERATOR + "singular_value_threshold": 1}),
        "singular_value_threshold: 1.0 leaves nothing of super_resolution",
    ),
    "no share of the operator": (
        [],
        change("task.yaml", **{OPERATOR + "singular_value_threshold": 2}),
        "singular_value_threshold: expected a number in [0, 1], found 2",
    ),
    "a blur that is true": (
        [],
        change(
            "task.yaml",
            measurement__operator={"name": "deblur", "type": "aniso", "intensity": [True, True]},
        ),
        "intensity: expected two positive numbers",
    ),
    "a mask that is an archive": (
        [],
        lambda: [
            np.savez("mask.npz", np.ones(32)),
            os.rename("mask.npz", "mask.npy"),
            change("task.yaml", measurement__operator={"name": "mri", "mask": "mask.npy"})(),
        ],
        "mask.npy: cannot be read as .npy",
    ),
    "a mask of a damaged header": (
        [],
        lambda: [
            np.save("mask.npy", np.ones(32)),
            write("mask.npy", open("mask.npy", "rb").read().replace(b"{'descr'", b"{'descr\n"))(),
            change("task.yaml", measurement__operator={"name": "mri", "mask": "mask.npy"})(),
        ],
        "mask.npy: cannot be read as .npy",
    ),
    "sigma beyond float32": ([], change("task.yaml", **{NOISE + "sigma": 1e39}), "sigma"),
    "a weight beyond float32": (
        [],
        change("task.yaml", conditioning__params={"scale": 1e40}),
        "conditioning.params.scale: expected a finite number",
    ),
    "variances that are not learned": (
        [],
        change("model.yaml", learn_sigma=False),
        "model_var_type: learned_range needs a network with learn_sigma: true",
    ),
    "a factor that is true": (
        [],
        change("model.yaml", channel_mult=[1, True]),
        "channel_mult: expected positive numbers",
    ),
    "a factor beyond all widths": (
        [],
        change("model.yaml", channel_mult="1,1e300"),
        "channel_mult 1e+300: expected at most",
    ),
    "yaml without a bottom": (
        [],
        write("task.yaml", b"a: " + 3000 * b"[" + 3000 * b"]"),
        "task.yaml: not valid YAML",
    ),
    "more digits than a number": (
        [],
        change("diffusion.yaml", timestep_respacing="ddim" + 5000 * "1"),
        "timestep_respacing",
    ),
    "samples that are no pictures": (
        ["--method", "vanilla"],
        lambda: [
            write("task.yaml", b"conditioning: {method: vanilla}")(),
            change("model.yaml", in_channels=5)(),
        ],
        "in_channels: samples of the prior are pictures of 1 or 3 channels, found 5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(tiny_run, capsys, case):
    arguments, prepare, says = BAD[case]
    if prepare:
        prepare()
    try:
        status = tiny_run("--save_dir", "out", *arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert error.startswith("error: ") and "\n" not in error and "Traceback" not in error
    assert says in error
    assert not os.path.exists("out"), "wrote results"
    assert not os.path.exists("exploited"), "ran code from a checkpoint"
