"""What traces cost on the networks that people bring: time and memory beside a plain forward and backward pass.

    python benchmarks/network_costs.py [--networks resnet50 vit_tiny ...] [--samples 16] [--stages] [--rivals]
                                          [--json FILE]

For every network: one estimate of all traces, weights and activations, by two random vectors for each sample, all
checks included, on one batch; the quantization points are found before. Its time is given in plain passes (forward, and
backward by all weights) over the same batch, the median of three rounds in which both run one after the other (one
round for the further stages). Peak memory is the growth of the process's resident memory over what it was before, in
processes of their own, as a multiple of the plain pass's.

`--stages` adds `measure_sensitivity` (ranges and errors of activations at the default bit widths) and
`measure_perturbation`, in plain passes too.

`--rivals` adds what the same number of random vectors costs by PyHessian (Hutchinson, `pip install pyhessian`) and
curvlinops (Gauss-Newton products for CrossEntropyLoss, `pip install curvlinops-for-pytorch`), both optional. They take
one layer at a time and weights only. To end in reasonable time they are given every n-th layer, three in all, and their
time is scaled to all layers. Equal numbers of vectors are not equal errors: `curvature.py` compares those. "-" stands
where a package is not installed or refuses the network.

Weights are random; inputs are random. UNet has a Dice loss for each
sample, GPT-2 and Llama predict next tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq

SEQUENCE = 128
# Random vectors of the default, and layers that the other packages are given.
PROBES, RIVAL_LAYERS = 2, 3


class UNet(nn.Module):
    """Two levels down and up again with skips: images `[N, 3, H, W]` to logits `[N, 4, H, W]`."""

    def __init__(self, width: int = 32, classes: int = 4) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.enter, self.down, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.widen1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.widen2 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1, self.up2 = block(4 * width, 2 * width), block(2 * width, width)
        self.leave = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.enter(x)
        middle = self.down(F.max_pool2d(high, 2))
        low = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up1(torch.cat([self.widen1(low), middle], 1))
        return self.leave(self.up2(torch.cat([self.widen2(middle), high], 1)))


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the soft Dice coefficient, averaged over classes and samples."""
    p = logits.softmax(1).flatten(2)
    wanted = F.one_hot(targets, logits.shape[1]).movedim(-1, 1).flatten(2).to(p.dtype)
    return (1 - (2 * (p * wanted).sum(2) + 1) / ((p + wanted).sum(2) + 1)).mean()


Case = tuple[nn.Module, tq.Task, Any]


def image_case(model: nn.Module, samples: int, size: int = 224) -> Case:
    """A classifier of 1000 classes with random images."""
    return model, tq.ClassificationTask(), (torch.randn(samples, 3, size, size), torch.randint(1000, (samples,)))


def timm_case(name: str) -> Callable[[int], Case]:
    """A network of timm's."""

    def make(samples: int) -> Case:
        import timm

        return image_case(timm.create_model(name, pretrained=False), samples)

    return make


def torchvision_case(name: str) -> Callable[[int], Case]:
    """A network of torchvision's."""

    def make(samples: int) -> Case:
        import torchvision

        return image_case(torchvision.models.get_model(name, weights=None), samples)

    return make


def mobilenet_case(samples: int) -> Case:
    """The repository's example, MobileNet v1 of width 0.25."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from mobilenet_v1 import MobileNetV1

    return image_case(MobileNetV1(), samples)


def text_case(kind: str) -> Callable[[int], Case]:
    """A network of transformers', sequences of 128 tokens."""

    def make(samples: int) -> Case:
        import transformers

        if kind == "bert":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
        elif kind == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        else:
            config = transformers.LlamaConfig(
                hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=4, vocab_size=32000,
            )  # fmt: skip
            model = transformers.LlamaForCausalLM(config)
        tokens = torch.randint(model.config.vocab_size, (samples, SEQUENCE))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if kind == "bert":
            batch["labels"] = torch.randint(2, (samples,))
        return model, tq.HuggingFaceTask(), batch

    return make


def unet_case(samples: int) -> Case:
    """UNet with a Dice loss, images of 96 pixels a side."""
    batch = (torch.randn(samples, 3, 96, 96), torch.randint(4, (samples, 96, 96)))
    return UNet(), tq.ClassificationTask(loss=dice), batch


NETWORKS: dict[str, Callable[[int], Case]] = {
    "resnet50": torchvision_case("resnet50"),
    "tf_efficientnet_lite0": timm_case("tf_efficientnet_lite0"),
    "mobilenetv3_small": torchvision_case("mobilenet_v3_small"),
    "mobilenet_v1_025": mobilenet_case,
    "efficientnet_b0": timm_case("efficientnet_b0"),
    "convnext_tiny": timm_case("convnext_tiny"),
    "vit_tiny": timm_case("vit_tiny_patch16_224"),
    "swin_tiny": timm_case("swin_tiny_patch4_window7_224"),
    "bert_base": text_case("bert"),
    "gpt2": text_case("gpt2"),
    "llama_small": text_case("llama"),
    "unet_dice": unet_case,
}
# Language models take a share of the samples: each has 128 positions.
SHARE = {"bert_base": 2, "gpt2": 4, "llama_small": 2}


def load(name: str, samples: int) -> Case:
    """A network in evaluation mode, its task and a batch."""
    torch.manual_seed(0)
    model, task, batch = NETWORKS[name](max(1, samples // SHARE.get(name, 1)))
    return model.eval(), task, batch


def plain_pass(model: nn.Module, task: tq.Task, batch: Any) -> None:
    """Forward and backward by all weights, as training does it."""
    model.zero_grad()
    task.loss(task.outputs(model, batch), batch).backward()
    model.zero_grad()


def peak(action: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory grew at most."""
    import resource

    gc.collect()
    before = psutil.Process().memory_info().rss
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measure(name: str, samples: int, mode: str) -> dict[str, Any]:
    """One network's figures; `mode` is "time", "stages", or whose memory is measured: "plain", "estimate"."""
    model, task, batch = load(name, samples)
    points = tq.discover(model, [batch], task)

    def plain() -> None:
        plain_pass(model, task, batch)

    def estimate() -> tq.Curvature:
        return tq.estimate_curvature(model, [batch], task, points=points)

    if mode in ("plain", "estimate"):
        return {"bytes": peak(plain if mode == "plain" else estimate)}
    actions: dict[str, Callable[[], Any]] = {"estimate": estimate}
    if mode == "stages":
        curvature = estimate()
        actions = {
            "sensitivity": lambda: tq.measure_sensitivity(model, [batch], task, curvature),
            "perturbation": lambda: tq.measure_perturbation(model, [batch], task, points, activation_bits=(4, 8)),
        }
    plain()
    ratios: dict[str, list[float]] = {action: [] for action in actions}
    result = None
    for _ in range(1 if mode == "stages" else 3):
        start = time.perf_counter()
        plain()
        unit = time.perf_counter() - start
        for action, run in actions.items():
            start = time.perf_counter()
            result = run()
            ratios[action].append((time.perf_counter() - start) / unit)
    figures: dict[str, Any] = {action: statistics.median(values) for action, values in ratios.items()}
    if mode == "time":
        figures |= {"reason": result.reason, "layers": len(points.layers), "samples": result.samples}
    return figures


def rivals(name: str, samples: int) -> dict[str, Any]:
    """What `PROBES` random vectors for every layer cost by other packages, in plain passes; None where they fail."""
    model, task, batch = load(name, samples)
    layers = tq.discover(model, [batch], task).layers
    some = [layers[len(layers) * (2 * i + 1) // (2 * RIVAL_LAYERS)].name for i in range(RIVAL_LAYERS)]

    class Whole(nn.Module):
        """The model on the whole batch, whatever it is handed."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, _: Any) -> Any:
            return task.outputs(self.model, batch)

    def pyhessian(weight: nn.Parameter) -> None:
        from pyhessian import hessian

        data = (torch.zeros(samples), torch.zeros(samples))
        hessian(Whole(), lambda outputs, _: task.loss(outputs, batch), data=data, cuda=False).trace(PROBES, tol=0)

    def curvlinops(weight: nn.Parameter) -> None:
        from curvlinops import GGNLinearOperator, hutchinson_trace

        if not isinstance(batch, tuple) or name == "unet_dice":
            raise ValueError("curvlinops knows pairs of inputs and labels, and no Dice loss")
        operator = GGNLinearOperator(model, nn.CrossEntropyLoss(), [weight], [batch], check_deterministic=False)
        for _ in range(PROBES):
            hutchinson_trace(operator, 1)

    plain_pass(model, task, batch)
    start = time.perf_counter()
    plain_pass(model, task, batch)
    unit = time.perf_counter() - start
    figures: dict[str, Any] = {}
    for package, run in (("pyhessian", pyhessian), ("curvlinops", curvlinops)):
        try:
            start = time.perf_counter()
            for layer in some:
                model.requires_grad_(False)
                run(model.get_parameter(f"{layer}.weight").requires_grad_(True))
                model.zero_grad()
            figures[package] = (time.perf_counter() - start) / unit / RIVAL_LAYERS * len(layers)
        except Exception as error:
            figures |= {package: None, f"{package}_error": str(error).splitlines()[0] if str(error) else repr(error)}
    return figures


def child(name: str, samples: int, mode: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    arguments = [sys.executable, __file__, "--one", name, "--mode", mode, "--samples", str(samples)]
    answer = subprocess.run(arguments, capture_output=True, text=True)
    if answer.returncode:
        return {"error": answer.stderr.strip().splitlines()[-1]}
    figures: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="time", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        one = rivals if options.mode == "rivals" else partial(measure, mode=options.mode)
        print(json.dumps(one(options.one, options.samples)))
        return
    print(f"torch {torch.__version__}, {platform.machine()}, one thread; batches of {options.samples} images\n")
    further = ["sensitivity", "perturbation"] * options.stages + ["pyhessian", "curvlinops"] * options.rivals
    header = "".join(f" {column:>12}" for column in further)
    print(f"{'network':22} {'layers':>6} {'passes':>7} {'memory':>7}{header}")
    table = {}
    for name in options.networks:
        row = child(name, options.samples, "time")
        memory = [child(name, options.samples, mode).get("bytes") for mode in ("estimate", "plain")]
        row["memory"] = memory[0] / memory[1] if all(memory) else None
        for mode in ["stages"] * options.stages + ["rivals"] * options.rivals:
            row |= child(name, options.samples, mode)
        table[name] = row
        if "error" in row:
            print(f"{name:22} {row['error']}", flush=True)
            continue
        line = f"{name:22} {row['layers']:6} {row['estimate']:7.2f} {row['memory'] or 0:7.2f}"
        line += "".join(" " + ("-" if row.get(c) is None else f"{row[c]:.2f}").rjust(12) for c in further)
        print(line, f"  {row['reason']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "networks": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
