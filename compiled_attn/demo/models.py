"""The subjects of the demo: real transformers of Diffusers with seeded random weights, tiny or at real width."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("flux", "wan", "qwen", "hunyuan")
DEFAULT = NAMES[:3]

# With weights as initialised, attention averages its keys away and a wrong kernel hides behind the residual stream.
# Twice the q and k norms gives scores of standard deviation 4, as peaked as trained ones, and four times the values a
# share of the output in which bfloat16 shows a doubled scale at 2.6 to 8 times the bound (at 0.7 to 2.9 without).
_SHARPER = (
    (2.0, ("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")),
    (4.0, ("to_v.weight", "add_v_proj.weight")),
)


@dataclass
class Subject:
    """A model in eval mode, and the keyword arguments of one forward."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    size: str

    def __call__(self, model: Any = None) -> Tensor:
        """The output of ``model`` (by default its own) on the inputs."""
        return (self.model if model is None else model)(**self.inputs)[0]

    def double(self) -> Subject:
        """The same in float64: weights and inputs as rounded to the low dtype, everything computed in float64."""
        inputs = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.inputs.items()
        }
        return Subject(self.name, copy.deepcopy(self.model).double(), inputs, self.size)


def build(name: str, device: str, dtype: torch.dtype, real: bool, seed: int = 0) -> Subject:
    """Model ``name`` of :data:`NAMES`, tiny or (``real``) at its real width and small depth."""
    makers = {"flux": _flux, "wan": _wan, "qwen": _qwen, "hunyuan": _hunyuan}
    with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.device(device):
        torch.manual_seed(seed)
        model, inputs, size = makers[name](real)
    model.eval()
    # what from_pretrained(torch_dtype=...) keeps in float32 stays so here
    kept = model._keep_in_fp32_modules or ()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            for factor, ends in _SHARPER:
                if path.endswith(ends):
                    parameter.mul_(factor)
            if not set(path.split(".")) & set(kept):
                parameter.data = parameter.data.to(dtype)
    ids = ("img_ids", "txt_ids")  # positions: they stay float32
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and key not in ids:
            inputs[key] = value.to(dtype)
    return Subject(name, model, {**inputs, "return_dict": False}, size)


def _grid_ids(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()


def _flux(real: bool) -> tuple[Any, dict[str, Any], str]:
    from diffusers import FluxTransformer2DModel

    if real:
        heads, dim, channels, text_width, pooled, axes = 24, 128, 64, 4096, 768, (16, 56, 56)
        side, text, double_blocks, single_blocks = 64, 512, 2, 4
    else:
        heads, dim, channels, text_width, pooled, axes = 2, 16, 4, 32, 32, (4, 4, 8)
        side, text, double_blocks, single_blocks = 6, 28, 1, 1
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=dim,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=pooled,
        axes_dims_rope=axes,
    )
    inputs = {
        "hidden_states": torch.randn(1, side * side, channels),
        "encoder_hidden_states": torch.randn(1, text, text_width),
        "pooled_projections": torch.randn(1, pooled),
        "timestep": torch.tensor([0.5]),
        "img_ids": _grid_ids(side, side),
        "txt_ids": torch.zeros(text, 3),
    }
    size = (
        f"{heads} heads x {dim}, {side * side} + {text} tokens, {double_blocks} double + {single_blocks} single blocks"
    )
    return model, inputs, size


def _wan(real: bool) -> tuple[Any, dict[str, Any], str]:
    from diffusers import WanTransformer3DModel

    if real:
        heads, dim, channels, text_width, hidden, frequencies = 12, 128, 16, 4096, 8960, 256
        frames, side, text, layers, rope = 4, 64, 512, 2, 1024
    else:
        heads, dim, channels, text_width, hidden, frequencies = 2, 12, 4, 16, 32, 256
        frames, side, text, layers, rope = 2, 16, 12, 2, 32
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_width,
        freq_dim=frequencies,
        ffn_dim=hidden,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=rope,
    )
    inputs = {
        "hidden_states": torch.randn(1, channels, frames, side, side),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, text_width),
    }
    tokens = frames * (side // 2) ** 2
    return model, inputs, f"{heads} heads x {dim}, {tokens} tokens, cross-attention to {text}, {layers} blocks"


def _qwen(real: bool) -> tuple[Any, dict[str, Any], str]:
    from diffusers import QwenImageTransformer2DModel

    if real:
        heads, dim, channels, text_width, axes = 24, 128, 64, 3584, (16, 56, 56)
        side, text, words, layers = 64, 512, 100, 2
    else:
        heads, dim, channels, text_width, axes = 4, 16, 16, 16, (8, 4, 4)
        side, text, words, layers = 4, 12, 5, 2
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=channels,
        out_channels=channels // 4,
        num_layers=layers,
        attention_head_dim=dim,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        guidance_embeds=False,
        axes_dims_rope=axes,
    )
    # Text comes first in the joint sequence: its padding is a hole in the middle of the keys.
    inputs = {
        "hidden_states": torch.randn(1, side * side, channels),
        "encoder_hidden_states": torch.randn(1, text, text_width),
        "encoder_hidden_states_mask": torch.arange(text)[None] < words,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, side, side)],
    }
    size = f"{heads} heads x {dim}, {words} of {text} text + {side * side} tokens, {layers} blocks"
    return model, inputs, size


def _hunyuan(real: bool) -> tuple[Any, dict[str, Any], str]:
    from diffusers import HunyuanVideoTransformer3DModel

    if real:
        heads, dim, channels, text_width, pooled, axes, patch = 24, 128, 16, 4096, 768, (16, 56, 56), 2
        frames, side, text, words, layers = 5, 64, 256, 100, 2
    else:
        heads, dim, channels, text_width, pooled, axes, patch = 2, 16, 4, 16, 8, (4, 6, 6), 1
        frames, side, text, words, layers = 1, 8, 12, 7, 1
    model = HunyuanVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=dim,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        patch_size=patch,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=text_width,
        pooled_projection_dim=pooled,
        rope_axes_dim=axes,
        image_condition_type=None,
    )
    # Text comes last, and its padding is masked in every call, whether there is any or not.
    inputs = {
        "hidden_states": torch.randn(1, channels, frames, side, side),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, text_width),
        "encoder_attention_mask": torch.arange(text)[None] < words,
        "pooled_projections": torch.randn(1, pooled),
        "guidance": torch.tensor([1000]),
    }
    tokens = frames * (side // patch) ** 2
    return model, inputs, f"{heads} heads x {dim}, {tokens} + {words} of {text} text tokens, {layers} + {layers} blocks"
