"""Grids, fake quantization, calibration and fine-tuning."""
