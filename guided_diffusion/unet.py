"""The ADM UNet of Dhariwal & Nichol, "Diffusion Models Beat GANs" (2021).

Module names and shapes follow the published checkpoints, so their state dicts load strictly.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.checkpoints import load_checkpoint
from guided_diffusion.normalisation import GroupNorm
from guided_diffusion.unet_layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Stage,
    Upsample,
    timestep_embedding,
    zero_init,
)
from util.config import parse_numbers
from util.errors import UserError

MOST = 1 << 14  # of pixels, channels and blocks
NUM_CLASSES = 1000  # ImageNet, for class_cond
CPU_PIXELS = 2 * 256 * 256  # at once, on a CPU: layers of more images do not stay in its caches
DEFAULT_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


class UNetModel(nn.Module):
    """The noise predictor ε_θ(x_t, t), and with twice the output channels its variance.

    Args mirror `create_model`; `attention_ds` holds the downsampling factors that attend.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_ds: Sequence[int],
        channel_mult: Sequence[float],
        dropout: float,
        num_classes: int | None,
        use_checkpoint: bool,
        num_heads: int,
        num_head_channels: int,
        num_heads_upsample: int,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        use_new_attention_order: bool,
        image_size: int,
    ):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.dtype = torch.float32
        self.size_multiple = 2 ** (len(channel_mult) - 1)
        self.least_side = (self.size_multiple + 1) // 3 + 1  # of what `forward` can reflect
        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        def res_block(channels, out, resample=None):
            return ResBlock(
                channels, emb_channels, dropout, out, use_scale_shift_norm, use_checkpoint, resample
            )

        def attention(channels, heads):
            return AttentionBlock(
                channels, heads, num_head_channels, use_new_attention_order, use_checkpoint
            )

        ch = int(channel_mult[0] * model_channels)
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, ch, 3, padding=1))])
        skip_channels = [ch]
        ds = 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                out = int(mult * model_channels)
                layers = [res_block(ch, out)]
                ch = out
                if ds in attention_ds:
                    layers.append(attention(ch, num_heads))
                self.input_blocks.append(Stage(*layers))
                skip_channels.append(ch)
            if level != len(channel_mult) - 1:
                down = res_block(ch, ch, "down") if resblock_updown else Downsample(ch, True)
                self.input_blocks.append(Stage(down))
                skip_channels.append(ch)
                ds *= 2

        self.middle_block = Stage(res_block(ch, ch), attention(ch, num_heads), res_block(ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                out = int(mult * model_channels)
                layers = [res_block(ch + skip_channels.pop(), out)]
                ch = out
                if ds in attention_ds:
                    layers.append(attention(ch, num_heads_upsample))
                if level and i == num_res_blocks:
                    layers.append(
                        res_block(ch, ch, "up") if resblock_updown else Upsample(ch, True)
                    )
                    ds //= 2
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            GroupNorm(ch), nn.SiLU(), zero_init(nn.Conv2d(ch, out_channels, 3, padding=1))
        )

    def set_torso_dtype(self, dtype: torch.dtype) -> "UNetModel":
        """Run the convolutional torso in `dtype`; embeddings, norms and the output stay float32."""
        for stage in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in stage.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)
        self.dtype = dtype
        return self

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in x.

        Args:
            x: (N, in_channels, H, W). Where H or W is no multiple of `size_multiple`, the
                network sees x reflected at its borders, and its output is cropped; that takes
                sides of at least `least_side`.
            timesteps: (N,) timesteps of the original schedule.
            y: (N,) class labels, for a class-conditional model only.

        Returns:
            (N, out_channels, H, W), of x's dtype.
        """
        size = max(1, CPU_PIXELS // x[0, 0].numel())
        if x.device.type == "cpu" and len(x) > size and not torch.is_grad_enabled():
            parts = range(0, len(x), size)
            labels = [None if y is None else y[i : i + size] for i in parts]
            inputs = zip(x.split(size), timesteps.split(size), labels, strict=True)
            return torch.cat([self._evaluate(*part) for part in inputs])
        return self._evaluate(x, timesteps, y)

    def _evaluate(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        height, width = x.shape[2:]
        rows, cols = -height % self.size_multiple, -width % self.size_multiple
        if rows or cols:  # half on either side, as a reflection must be smaller than the image
            border = (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2)
            x = F.pad(x, border, mode="reflect")
        h = x.to(self.dtype)
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        with torch.autocast(x.device.type, enabled=False):  # ε keeps the precision of x
            out = self.out(h.to(x.dtype))
        return out[..., rows // 2 : rows // 2 + height, cols // 2 : cols // 2 + width]


def check_counts(where: str = "model config", **counts: int) -> None:
    """Raise the UserError of a number of pixels, channels or blocks that no network has."""
    for key, count in counts.items():
        if count < 1:
            raise UserError(f"{where}: {key}: expected at least 1, found {count}")
        if count > MOST:
            raise UserError(f"{where}: {key}: expected at most {MOST}, found {count}")


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str | Sequence[float] | None = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str | int | Sequence[int] = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0.0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    in_channels: int = 3,
    model_path: str = "",
) -> UNetModel:
    """Build the UNet that a model YAML describes and load its checkpoint.

    Args:
        image_size: the training size; it sets the default `channel_mult` and turns
            `attention_resolutions` into levels. Other sizes may be run.
        channel_mult: "1,2,4" or a list; "" means the published default of `image_size`.
        model_path: checkpoint to load, strictly; "" builds an untrained network.

    Returns:
        `UNetModel` in eval mode on the CPU.

    Raises:
        UserError: a value that makes no network, or a checkpoint that does not fit it.
    """
    check_counts(
        image_size=image_size,
        num_channels=num_channels,
        num_res_blocks=num_res_blocks,
        in_channels=in_channels,
    )
    if not 0 <= dropout <= 1:
        raise UserError(f"model config: dropout: expected a number from 0 to 1, found {dropout}")
    if channel_mult in ("", None):
        if image_size not in DEFAULT_CHANNEL_MULT:
            raise UserError(
                f"model config: channel_mult: image_size {image_size} has no default (only "
                f"{', '.join(map(str, sorted(DEFAULT_CHANNEL_MULT)))} have), give it in full"
            )
        channel_mult = DEFAULT_CHANNEL_MULT[image_size]
    else:
        channel_mult = parse_numbers(channel_mult, "model config: channel_mult")
        if not channel_mult:
            raise UserError(
                "model config: channel_mult: expected a factor for each level, found none"
            )
    for mult in channel_mult:
        if mult * num_channels > MOST:
            raise UserError(
                f"model config: num_channels {num_channels} times channel_mult {mult:g}: expected "
                f"at most {MOST}"
            )
        if int(mult * num_channels) % 32 or int(mult * num_channels) == 0:
            raise UserError(
                f"model config: num_channels {num_channels} times channel_mult {mult:g} must be "
                "a multiple of 32, the number of normalisation groups"
            )
    resolutions = parse_numbers(attention_resolutions, "model config: attention_resolutions")
    if not all(r == int(r) for r in resolutions):
        raise UserError(
            "model config: attention_resolutions: expected sides in whole pixels, found "
            f"{attention_resolutions!r}"
        )
    model = UNetModel(
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_ds=tuple(image_size // int(r) for r in resolutions),
        channel_mult=channel_mult,
        dropout=dropout,
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads if num_heads_upsample == -1 else num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        image_size=image_size,
    )
    if model_path:
        load_checkpoint(model, model_path)
    if use_fp16:
        model.set_torso_dtype(torch.float16)
    return model.eval()
