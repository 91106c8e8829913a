"""The network: published numbers, published checkpoints, and every option."""

import math
import re
import zlib

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from guided_diffusion import unet
from guided_diffusion.checkpoints import save_checkpoint
from guided_diffusion.unet import create_model
from guided_diffusion.unet_layers import AttentionBlock, timestep_embedding
from tests.conftest import TINY, golden_json, rnd
from util.errors import UserError

NORMS = ("in_layers.0.weight", "out_layers.0.weight", "norm.weight", "out.0.weight")
PUBLISHED = {"keys_mri128": (128, 3, "32,16,8"), "keys_openai256": (256, 2, "32,16,8")}
PUBLISHED["keys_ffhq"] = (128, 1, 16)


def randomise(model, scale=0.05):
    """Weights decided by the keys' names, as the golden ones were."""
    state = {}
    for key, value in model.state_dict().items():
        weight = rnd(tuple(value.shape), zlib.crc32(key.encode())) * scale
        state[key] = weight + 1 if value.ndim == 1 and key.endswith(NORMS) else weight
    model.load_state_dict(state)
    return model


def tiny(**changes):
    return randomise(create_model(**{**TINY, **changes}))


def test_output_equals_published(golden, assert_golden):
    model = create_model(**golden_json(golden, "unet_a/cfg"))
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == golden_json(golden, "unet_a/keys")
    with torch.no_grad():
        output = randomise(model)(rnd((2, 3, 64, 64), 11), torch.tensor([3, 777]))
    assert_golden("unet_a", output, 1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_have_the_published_keys(golden, name):
    channels, blocks, attention = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(
            image_size=256,
            num_channels=channels,
            num_res_blocks=blocks,
            attention_resolutions=attention,
            num_head_channels=64,
            learn_sigma=True,
            use_scale_shift_norm=True,
            resblock_updown=True,
        )
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == golden_json(golden, name)


@pytest.mark.parametrize("wrapped", ["plain", "data_parallel", "averaged", "half"])
def test_checkpoints_load_from_wrappers(tmp_path, wrapped):
    model, path = tiny(), tmp_path / "w.pt"
    if wrapped == "plain":
        torch.save(model.state_dict(), path)
    elif wrapped == "data_parallel":
        torch.save(torch.nn.DataParallel(model).state_dict(), path)
    elif wrapped == "averaged":
        torch.save(AveragedModel(model).state_dict(), path)
    else:
        save_checkpoint(model, str(path))
    loaded = create_model(**TINY, model_path=str(path)).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-3, atol=1e-4)


def test_timestep_embedding_is_the_sinusoid_of_the_paper():
    embedding = timestep_embedding(torch.tensor([0, 40]), 7)
    assert embedding.shape == (2, 7)
    for i in range(3):
        frequency = 10000 ** (-i / 3)
        assert embedding[1, i].item() == pytest.approx(math.cos(40 * frequency), abs=1e-5)
        assert embedding[1, 3 + i].item() == pytest.approx(math.sin(40 * frequency), abs=1e-5)
    assert embedding[1, 6] == 0


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_equals_an_explicit_softmax(new_order):
    block = AttentionBlock(64, 2, -1, new_order, use_checkpoint=False)
    randomise(block)
    x = rnd((2, 64, 3, 5), 1)
    qkv = torch.nn.functional.group_norm(x, 32, block.norm.weight, block.norm.bias)
    qkv = torch.einsum("oc,ncl->nol", block.qkv.weight[..., 0], qkv.flatten(2))
    qkv = qkv + block.qkv.bias[:, None]
    heads = []
    for head in range(2):
        if new_order:  # all queries, all keys, all values; each split into heads
            q, k, v = (qkv[:, 64 * i + 32 * head : 64 * i + 32 * (head + 1)] for i in range(3))
        else:  # head by head its query, key and value
            q, k, v = (qkv[:, 96 * head + 32 * i : 96 * head + 32 * (i + 1)] for i in range(3))
        weights = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(32), dim=-1)
        heads.append(torch.einsum("nqk,nck->ncq", weights, v))
    out = torch.einsum("oc,ncl->nol", block.proj_out.weight[..., 0], torch.cat(heads, 1))
    expected = x + (out + block.proj_out.bias[:, None]).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 3},
        {"learn_sigma": False},
        {"resblock_updown": False},
        {"use_scale_shift_norm": False, "num_channels": 64},
        {"num_heads": 2, "num_head_channels": -1, "num_heads_upsample": 4},
        {"channel_mult": [1, 2, 2], "attention_resolutions": "16,8", "num_res_blocks": 2},
        {"use_new_attention_order": True, "dropout": 0.5},
    ],
)
def test_options_run_and_a_batch_is_its_images(changes):
    model = tiny(**changes)
    channels = changes.get("in_channels", 1)
    x, t = rnd((3, channels, 16, 24), 5), torch.tensor([0, 500, 999])
    with torch.no_grad():
        together = model(x, t)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    factor = 1 if changes.get("learn_sigma") is False else 2
    assert together.shape == (3, factor * channels, 16, 24)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], model(x[:1], t[1:2])[0], atol=1e-3)  # t matters


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_head_channels": -1, "num_heads": 3}, "num_heads 3, or num_heads_upsample, does not"),
        ({"num_head_channels": -1, "num_heads": 0}, "num_heads 0, or"),
        ({"num_head_channels": -1, "num_heads_upsample": 5}, "num_heads 5, or num_heads_upsample"),
        ({"num_head_channels": 0}, "num_head_channels 0 does not divide the 32 channels"),
        ({"num_head_channels": -32}, "num_head_channels -32 does not divide"),
        ({"attention_resolutions": 0.5}, "attention_resolutions: expected sides in whole pixels"),
        ({"attention_resolutions": "16,2.5"}, "whole pixels, found '16,2.5'"),
        ({"dropout": 2}, "dropout: expected a number from 0 to 1, found 2"),
        ({"num_res_blocks": -1}, "num_res_blocks: expected at least 1, found -1"),
        ({"num_channels": -32}, "num_channels: expected at least 1, found -32"),
        ({"in_channels": 0}, "in_channels: expected at least 1, found 0"),
        ({"channel_mult": ","}, "channel_mult: expected a factor for each level"),
    ],
)
def test_values_that_make_no_network(changes, says):
    with pytest.raises(UserError, match=f"^model config: .*{re.escape(says)}"):
        create_model(**{**TINY, **changes})


def test_class_labels_change_the_output():
    model = tiny(class_cond=True)
    x, t = rnd((1, 1, 16, 16), 5), torch.tensor([500])
    assert not torch.allclose(model(x, t, torch.tensor([1])), model(x, t, torch.tensor([2])))


@pytest.mark.parametrize("class_cond", [False, True])
def test_a_batch_too_large_for_caches_is_evaluated_in_parts(monkeypatch, class_cond):
    model = tiny(class_cond=class_cond)
    x, t = rnd((5, 1, 16, 24), 5), torch.tensor([0, 500, 999, 3, 4])
    labels = torch.arange(5) if class_cond else None
    together, parts, evaluate = model(x, t, labels), [], model._evaluate
    monkeypatch.setattr(unet, "CPU_PIXELS", 2 * 16 * 24 + 1)
    monkeypatch.setattr(model, "_evaluate", lambda *a: parts.append(len(a[0])) or evaluate(*a))
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, labels), together, rtol=1e-4, atol=1e-4)
    assert parts == [2, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_torso_stays_close(dtype):
    x, t = rnd((2, 1, 32, 32), 5), torch.tensor([10, 900])
    with torch.no_grad():
        exact = tiny()(x, t)
        half = tiny().set_torso_dtype(dtype)(x, t)
    assert half.dtype == torch.float32
    relative = ((half - exact).norm() / exact.norm()).item()
    assert 0 < relative < (5e-3 if dtype == torch.float16 else 3e-2)


def test_use_fp16_casts_the_convolutions():
    model = create_model(**TINY, use_fp16=True)
    assert model.middle_block[0].in_layers[2].weight.dtype == torch.float16
    assert model.time_embed[0].weight.dtype == torch.float32
    assert model.out[2].weight.dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint).train()
        model(rnd((1, 1, 16, 16), 5), torch.tensor([100])).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("size", [(33, 47), (38, 64), (9, 20)])
def test_an_image_of_any_size_is_reflected_at_its_borders(size):
    torch.manual_seed(0)
    model = create_model(**{**TINY, "channel_mult": "1,1,1,1"})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    assert min(size) >= model.least_side
    x, t = rnd((2, 1, *size), 1), torch.tensor([10, 500])
    pads = [((-n % 8) // 2, -n % 8 - (-n % 8) // 2) for n in size]
    wide = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *pads], mode="reflect"))
    with torch.no_grad():
        expected = model(wide, t)
        found = model(x, t)
    (top, _), (left, _) = pads
    torch.testing.assert_close(
        found, expected[..., top : top + size[0], left : left + size[1]], rtol=0, atol=0
    )


@pytest.mark.parametrize("levels", [2, 4, 5, 6, 7])
def test_the_least_side_is_the_least_that_can_be_reflected(levels):
    model = create_model(**{**TINY, "channel_mult": ",".join("1" * levels)})

    def fits(side):
        pad = -side % model.size_multiple
        return pad - pad // 2 < side

    assert fits(model.least_side) and not fits(model.least_side - 1)
    assert all(fits(side) for side in range(model.least_side, 200))
