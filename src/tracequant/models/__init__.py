"""Networks of the paper that torchvision does not have."""

from tracequant.models.squeezenext import SqueezeNext

__all__ = ["SqueezeNext"]
