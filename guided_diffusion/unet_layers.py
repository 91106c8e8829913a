"""The layers of the ADM UNet; module names follow the published checkpoints."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guided_diffusion.normalisation import GroupNorm
from util.errors import UserError

Resampling = Literal["up", "down"] | None


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of timesteps.

    Args:
        t: (N,) timesteps, may be fractional.
        dim: width of the embedding; cosines fill the first half, sines the second.

    Returns:
        (N, dim) float32 tensor.
    """
    half = dim // 2
    freqs = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * freqs
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling ×2, then a 3×3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Halve height and width, by a strided 3×3 convolution if `use_conv`, else by averaging."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op: nn.Module = nn.AvgPool2d(2)
        if use_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block conditioned on the timestep embedding; `resample` is None, "up" or "down"."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool,
        use_checkpoint: bool,
        resample: Resampling = None,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample: nn.Module = nn.Identity()
        if resample == "up":
            self.resample = Upsample(channels, use_conv=False)
        elif resample == "down":
            self.resample = Downsample(channels, use_conv=False)
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        in_norm, in_act, in_conv = self.in_layers
        out_norm, *out_rest = self.out_layers
        h = in_conv(self.resample(in_act(in_norm(x))))
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = out_norm(h, scale, shift)
        else:
            h = out_norm(h + emb)
        for layer in out_rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention among all positions of a feature map.

    `new_order` splits query, key and value before the heads; the order of older checkpoints
    splits the heads first.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        num_head_channels: int,
        new_order: bool,
        use_checkpoint: bool,
    ):
        super().__init__()
        if num_head_channels != -1:
            if num_head_channels < 1 or channels % num_head_channels:
                raise UserError(
                    f"model config: num_head_channels {num_head_channels} does not divide the "
                    f"{channels} channels of an attention block"
                )
            num_heads = channels // num_head_channels
        elif num_heads < 1 or channels % num_heads:
            raise UserError(
                f"model config: num_heads {num_heads}, or num_heads_upsample, does not divide the "
                f"{channels} channels of an attention block"
            )
        self.num_heads = num_heads
        self.new_order = new_order
        self.use_checkpoint = use_checkpoint
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x):
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x).reshape(n, c, height * width))
        if self.new_order:
            qkv = qkv.reshape(n, 3, self.num_heads, -1, height * width).transpose(1, 2)
        else:
            qkv = qkv.reshape(n, self.num_heads, 3, -1, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(2)  # each (N, heads, H·W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(2, 3).reshape(n, c, height * width)
        return x + self.proj_out(h).reshape(n, c, height, width)


class Stage(nn.Sequential):
    """Layers in sequence; the timestep embedding goes to those that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def zero_init(layer: nn.Module) -> nn.Module:
    """The layer, its weights set to 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
