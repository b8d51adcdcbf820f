"""A task of your own: any model, any data, your own loss. Quantize it with

    tracequant run --task examples/own_model.py:build --average-bits 3 --finetune-steps 100 --out runs/own

The function returns a `TaskSetup`. Parameters it shares with the command line (data_dir, weights, model, samples,
batch_size, seed) are filled from there.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tracequant as tq


def smoothed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss whose curvature is measured: averaged over the batch, as every task's loss must be."""
    return F.cross_entropy(logits, targets, label_smoothing=0.05)


def build(batch_size: int = 32, seed: int = 0) -> tq.TaskSetup:
    """A small network for scikit-learn's wine data, trained on the spot (13 measurements, 3 kinds of wine)."""
    wine = load_wine()
    inputs = torch.tensor(wine.data, dtype=torch.float32)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = torch.tensor(wine.target)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    train = TensorDataset(inputs[order[:120]], targets[order[:120]])
    test = TensorDataset(inputs[order[120:]], targets[order[120:]])
    return tq.TaskSetup(
        model=train_model(train, seed),
        task=tq.ClassificationTask(loss=smoothed_loss),
        calibration=DataLoader(train, batch_size),
        train=DataLoader(train, batch_size, shuffle=True),
        evaluation=DataLoader(test, batch_size),
    )


def train_model(train: TensorDataset, seed: int) -> nn.Module:
    """A network of three layers after 200 full-batch steps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, targets = train.tensors
    for _ in range(200):
        loss = smoothed_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
