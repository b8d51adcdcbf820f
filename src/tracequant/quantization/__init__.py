"""Grids, fake quantization, calibration and quantization-aware training."""
