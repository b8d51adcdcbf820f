"""Lay the small ImageNet sets out as `--task imagenet` and torchvision's ImageFolder expect them.

    python benchmarks/imagenet_tree.py DIR

`imagenet_train1000` becomes DIR/train, with a folder for each of the 1,000 classes, and `imagenet_val500` DIR/val, with
folders for its ten.
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from pathlib import Path

from data import data_folder

DATA = ("imagenet_train1000", "imagenet_val500")


def lay_out(folder: Path, target: Path) -> Path:
    """Write `target/train` and `target/val` from the data folder; files that are there already are left alone."""
    with zipfile.ZipFile(folder / DATA[0] / "images.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".jpg"):
                wnid = Path(name).stem.partition("_")[2]
                _write(archive, name, target / "train" / wnid / Path(name).name)
    with zipfile.ZipFile(folder / DATA[1] / "images.zip") as archive:
        files = {Path(name).name: name for name in archive.namelist()}
        for row in csv.DictReader(io.StringIO((folder / DATA[1] / "labels.csv").read_text())):
            _write(archive, files[row["file"]], target / "val" / row["wnid"] / row["file"])
    return target


def _write(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(archive.read(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path, metavar="DIR")
    found = data_folder(*DATA)
    target = parser.parse_args().target
    if found is None:
        raise SystemExit(f"set TRACEQUANT_DATA to a folder with {' and '.join(DATA)}")
    print(lay_out(found, target))
