"""What a step of fine-tuning costs: fake-quantized ResNet20, batch 128, against the float network in the same run.

    python benchmarks/finetuning_step.py [--rounds 15] [--compile] [--out FILE]

A step is forward pass, backward pass and SGD on random images; SGD updates all parameters in one call, as
`tracequant.finetune` does. All weights have 3 bits, all activations 4, all scales are learned. Brevitas, where it is
installed, trains the same network: convolutions and the linear layer with 3-bit weights and 4-bit inputs. Rounds of one
step each alternate between the methods; the table has medians. --compile adds torch.compile, which needs a C++ compiler
on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from tracequant.tasks.networks.residual import SmallResNet

WEIGHT_BITS, ACTIVATION_BITS = 3, 4
RESULTS = Path(__file__).parent / "results" / "finetuning_step.json"


def quantized(model: nn.Module, batch: Any) -> nn.Module:
    """The network with our quantizers."""
    task = tq.ClassificationTask()
    points = tq.discover(model, [batch], task)
    curvature = tq.estimate_curvature(model, [batch], task, estimator="gauss_newton", num_probes=1, points=points)
    sensitivity = tq.measure_sensitivity(
        model,
        [batch],
        task,
        curvature,
        weight_bits=(WEIGHT_BITS,),
        weight_grid=tq.WeightGrid(rounding="nearest"),
        activation_bits=(ACTIVATION_BITS,),
    )
    return tq.quantize(model, [batch], task, tq.uniform_plan(sensitivity, WEIGHT_BITS))


def with_brevitas(model: nn.Module) -> nn.Module:
    """The network with Brevitas's layers in place of torch's: learned scales, one for each channel of a weight."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        common: dict[str, Any] = {
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": WEIGHT_BITS,
            "input_quant": Int8ActPerTensorFloat if name == "conv1" else Uint8ActPerTensorFloat,
            "input_bit_width": 8 if name == "conv1" else ACTIVATION_BITS,
        }
        if isinstance(module, nn.Conv2d):
            new: nn.Module = qnn.QuantConv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, bias=False,
                **common,
            )  # fmt: skip
        elif isinstance(module, nn.Linear):
            new = qnn.QuantLinear(module.in_features, module.out_features, bias=True, **common)
        else:
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    return model


def stepper(
    model: nn.Module, images: Tensor, targets: Tensor, channels_last: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """One training step of a model."""
    model = model.train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if compiled:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = SmallResNet(blocks=3).to(device)
    images, targets = torch.randn(128, 3, 32, 32, device=device), torch.randint(0, 10, (128,), device=device)
    model(images)  # BatchNorm statistics, without which curvature and ranges would be those of another network
    ours = quantized(model.eval(), (images, targets))
    nets: dict[str, tuple[nn.Module, bool, bool]] = {
        "float32": (model, False, False),
        "tracequant": (ours, False, False),
        "float32, channels last": (model, True, False),
        "tracequant, channels last": (ours, True, False),
    }
    if given.compile:
        nets["float32, channels last, compiled"] = (model, True, True)
        nets["tracequant, channels last, compiled"] = (ours, True, True)
    try:
        import brevitas

        nets[f"Brevitas {brevitas.__version__}"] = (with_brevitas(model), False, False)
        nets[f"Brevitas {brevitas.__version__}, channels last"] = (with_brevitas(model), True, False)
    except ImportError as error:
        print(f"Brevitas is left out: {error}", file=sys.stderr)
    steps = {
        name: stepper(copy.deepcopy(net), images, targets, channels_last, compiled)
        for name, (net, channels_last, compiled) in nets.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(given.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 3:  # the first steps allocate and compile
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"tracequant {tq.__version__}, torch {torch.__version__}, {machine}, {platform.machine()}\n")
    print("| step of ResNet20, 128 images | times the float step | times float of its own kind |\n|---|---|---|")
    ratios = {}
    for name, median in medians.items():
        base = medians["float32" + name.partition(",")[1] + name.partition(",")[2]]
        ratios[name] = {"float": median / medians["float32"], "own_kind": median / base}
        print(f"| {name} | {ratios[name]['float']:.2f} | {ratios[name]['own_kind']:.2f} |")
    result = {"torch": torch.__version__, "device": machine, "rounds": given.rounds, "ratios": ratios}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
