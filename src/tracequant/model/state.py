"""Borrowing a caller's model and giving it back exactly as it came."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracequant.core.errors import ModelError


@contextmanager
def frozen_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards modes, `requires_grad`, `.grad`, buffers and RNG are as before.

    Caches of keys and values are off: nothing here reads them, and they take the memory of a tensor for each layer.

    Hooks are not restored here: whoever registers one removes it. Raises `ModelError` for a reentrant checkpoint, which
    gives no gradients of single tensors.
    """
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    # torch's fused encoder layers call no submodules, and turn padded batches into nested tensors.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)), without_cache(model):
            model.eval()
            yield
    except RuntimeError as error:
        if "torch.utils.checkpoint is incompatible" not in str(error):
            raise
        raise ModelError(
            "the model checkpoints activations with use_reentrant=True, which gives no gradients of single tensors;"
            " call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad, grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                if not torch.equal(buffer, saved):  # an expanded buffer cannot be written, but does not change either
                    buffer.copy_(saved)
                setattr(module, name, buffer)  # the model may have put another tensor in its place


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Language models return no cache of keys and values inside the block.

    Those of Hugging Face return one if `use_cache` of their configuration says so, unless the caller asks otherwise.
    """
    configurations: dict[int, Any] = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}
    changed = []
    try:
        for config in configurations.values():
            if getattr(config, "use_cache", None) is True:
                with suppress(AttributeError):  # one that cannot be changed
                    config.use_cache = False
                    changed.append(config)
        yield
    finally:
        for config in changed:
            config.use_cache = True


@contextmanager
def double_backward() -> Iterator[None]:
    """Attention by its math kernel: the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and values of all parameters and buffers, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
