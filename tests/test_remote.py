"""Configs, checkpoints and images at addresses rather than local paths."""

import functools
import http.server
import os
import threading

import blobfile as bf
import pytest

from tests.conftest import task, write_yaml
from util import remote
from util.config import read_yaml

SR = "super_resolution/x4/0.05"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the current folder, but for what is secret."""

    def send_head(self):
        if "secret" in self.path:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tiny_run):
    handler = functools.partial(Handler, directory=os.getcwd())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket/ is the current folder; what blobfile is asked for, and by whom, is kept."""
    open_local, list_local = bf.BlobFile, bf.listdir

    def local(path):
        assert path.startswith("gs://bucket/")
        return os.path.join(os.getcwd(), path.removeprefix("gs://bucket/"))

    monkeypatch.setattr(remote.bf, "BlobFile", lambda path, mode: open_local(local(path), mode))
    monkeypatch.setattr(remote.bf, "listdir", lambda path: list_local(local(path)))
    return "gs://bucket"


def same(one, other):
    with open(one, "rb") as a, open(other, "rb") as b:
        return a.read() == b.read()


def run_remotely(tiny_run, where, root):
    """A run whose files are all remote."""
    config = read_yaml("model.yaml")
    write_yaml("far_model.yaml", {**config, "model_path": f"{where}/tiny.pt"})
    write_yaml("far_task.yaml", task(root=root))
    flags = [f"--{kind}_config={where}/far_{kind}.yaml" for kind in ("model", "task")]
    flags.append(f"--diffusion_config={where}/diffusion.yaml")
    return tiny_run(*flags, "--save_dir", "far")


def test_a_run_of_files_on_the_web(tiny_run, web):
    assert run_remotely(tiny_run, web, f"{web}/images/a1.png?token=1") == 0
    assert tiny_run("--save_dir", "near", "--limit", "1") == 0
    assert os.listdir(f"far/tiny/{SR}/recon") == ["a1.png"]
    assert same(f"far/tiny/{SR}/recon/a1.png", f"near/tiny/{SR}/recon/a1.png")


def test_a_run_of_files_in_a_bucket(tiny_run, bucket):
    assert run_remotely(tiny_run, bucket, f"{bucket}/images") == 0
    assert tiny_run("--save_dir", "near") == 0
    for name in ("a1", "a2", "a10"):
        assert same(f"far/tiny/{SR}/recon/{name}.png", f"near/tiny/{SR}/recon/{name}.png")


@pytest.mark.parametrize(
    ("model_path", "root", "says"),
    [
        ("none.pt", "images/a1.png", "model_path: no checkpoint at"),
        ("secret.pt", "images/a1.png", "secret.pt cannot be read (access refused, status 403)"),
        ("tiny.pt", "images/", "on the web folders cannot be listed"),
        ("tiny.pt", "images/none.png", "1 of 1 images could not be restored: none"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(tiny_run, web, capsys, model_path, root, says):
    config = read_yaml("model.yaml")
    write_yaml("model.yaml", {**config, "model_path": f"{web}/{model_path}"})
    write_yaml("task.yaml", task(root=f"{web}/{root}"))
    assert tiny_run("--save_dir", "out") == 2
    errors = capsys.readouterr().err
    assert says in errors.strip().splitlines()[-1]
    assert "none" not in root or "error: none.png: cannot be read as an image (no such" in errors


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("{web}/none.yaml", "none.yaml: no such file"),
        ("{web}/secret.yaml", "secret.yaml: cannot be read (access refused, status 403)"),
        ("http://127.0.0.1:1/x.yaml", "x.yaml: cannot be read (Connection refused)"),
        ("far://x.yaml", "cannot be read (unknown url type: far)"),
    ],
)
def test_a_config_that_cannot_be_had_is_one_sentence(tiny_run, web, capsys, address, says):
    assert tiny_run("--save_dir", "out", "--task_config", address.format(web=web)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line


def test_blobfile_s_own_errors_are_one_sentence(monkeypatch):
    def refuse(status):
        def blob_file(path, mode):
            raise bf.RequestFailure("no", "GET", status, None, None)

        monkeypatch.setattr(remote.bf, "BlobFile", blob_file)
        with remote.local_file("gs://bucket/x"):
            pass

    with pytest.raises(FileNotFoundError):
        refuse(404)
    with pytest.raises(PermissionError, match="access refused, status 403"):
        refuse(403)
    with pytest.raises(OSError, match="no"):
        refuse(0)
