"""Kinds of modules and of numbers that the rest of the package distinguishes."""

from __future__ import annotations

import torch
from torch import nn

from tracequant.core.packed_layout import DTYPE_BYTES

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)

# safetensors' dtype names, the ones that packed_layout counts bytes for.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
assert set(DTYPE_NAMES.values()) == set(DTYPE_BYTES)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm, which a runtime folds into the convolution before it."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_frozen_norm(module)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of constants, as detectors have: each library has a class of its own for it."""
    buffers = {name for name, _ in module.named_buffers(recurse=False)} - {"num_batches_tracked"}
    alone = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return alone and buffers == {"weight", "bias", "running_mean", "running_var"}
