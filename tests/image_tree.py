"""A small tree of generated images in ImageFolder's layout, for the tests of the imagenet task."""

from pathlib import Path

import numpy as np
import pytest

COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 60))


def make_tree(
    root: Path, train: dict[str, int], val: dict[str, int], size: tuple[int, int] = (72, 80), seed: int = 0
) -> Path:
    """Noisy images of one colour for each class; `train` and `val` say how many."""
    pictures = pytest.importorskip("PIL.Image", reason="the imagenet task needs the extra 'vision'")
    rng = np.random.default_rng(seed)
    names = sorted({**train, **val})
    for part, counts in (("train", train), ("val", val)):
        for name, count in counts.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = np.array(COLOURS[names.index(name) % len(COLOURS)])
                pixels = np.clip(colour + rng.normal(0, 40, (*size, 3)), 0, 255).astype(np.uint8)
                pictures.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root
