"""The whole flow from the command line, and its result as the tables that the README shows.

    python benchmarks/end_to_end.py [--out DIR]

Runs `tracequant demo` with three seeds, and where TRACEQUANT_DATA holds CIFAR-10 the ResNet20 run at 12x with 4-bit
activations and 400 fine-tuning steps. Run directories are kept, and a second call only prints.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from data import data_folder
from tracequant import __version__
from tracequant.core.plan import MIB
from tracequant.run.directory import RunDirectory


def tracequant(*arguments: str) -> str:
    """What the command line printed, run in a process of its own."""
    command = [sys.executable, "-m", "tracequant", *arguments]
    print("$", "tracequant", *arguments, file=sys.stderr)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def print_table(path: Path) -> None:
    """Result rows of a finished run as Markdown, and the accuracy of the packed file in a fresh process."""
    run = RunDirectory(path)
    print(f"| model | {run.quantize_result().metric_name} | MiB on disk | bits per weight |\n|---|---|---|---|")
    for row in run.result_rows():
        print(f"| {row.name} | {row.metric:.2f} | {row.size_bytes / MIB:.4f} | {row.average_bits:.2f} |")
    again = json.loads(tracequant("evaluate", str(path), "--json", "--quiet"))
    packed, plan = run.pack_result(), run.plan()
    assert again["metric"] == packed.evaluation.metric, "the packed file's accuracy is not the one that was reported"
    print(
        f"\nPacked: {packed.file_bytes:,} bytes, {packed.promised_bytes:,} promised; weights {plan.compression:.2f}x"
        f" smaller; evaluated in a fresh process: {again['metric']:.2f}\n"
    )


def main() -> None:
    """Run both flows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    out = parser.parse_args().out
    threads = torch.get_num_threads()
    print(f"tracequant {__version__}, torch {torch.__version__}, {threads} CPU threads, {platform.machine()}\n")
    for seed in range(3):
        tracequant("demo", "--out", str(out / f"demo-{seed}"), "--seed", str(seed), "--quiet")
        print(f"Demo, seed {seed}:\n")
        print_table(out / f"demo-{seed}")
    folder = data_folder("cifar10", "cifar10_weights")
    if folder is None:
        print("ResNet20/CIFAR-10 skipped: TRACEQUANT_DATA does not hold cifar10 and cifar10_weights")
        return
    tracequant(
        "run", "--task", "cifar10", "--data-dir", str(folder / "cifar10"),
        "--weights", str(folder / "cifar10_weights" / "resnet20.safetensors"), "--weight-bits", "2,3,4,8",
        "--activation-bits", "4", "--compression", "12", "--finetune-steps", "400", "--out", str(out / "cifar10"),
        "--quiet",
    )  # fmt: skip
    print_table(out / "cifar10")


if __name__ == "__main__":
    main()
