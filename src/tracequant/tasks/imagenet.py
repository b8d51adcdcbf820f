"""ImageNet, or any classes of images in folders, with networks of torchvision and timm, and SqueezeNext.

    DIR/train/<class>/*.jpg
    DIR/val/<class>/*.jpg

Classes are numbered in the alphabetical order of the folders in `train`, or of the lines of `DIR/classes.txt` where
there is one; `val` need not have them all. A network of your own comes along by `image_folder`:
examples/mobilenet_v1.py.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tracequant.core.errors import DataError, TaskError
from tracequant.core.settings import TaskOptions
from tracequant.model.classification import ClassificationTask
from tracequant.model.task import TaskSetup
from tracequant.tasks.networks import squeezenext
from tracequant.tasks.weights import load_state, read_state

SAMPLES, BATCH_SIZE, WORKERS = 512, 64, 4
KINDS = "torchvision:NAME, timm:NAME, squeezenext[:WIDTH] or squeezenext-23v5[:WIDTH]"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Heads that only training uses; the paper's sizes are without them. The published weights expect other normalisation
# than they are given, which `transform_input` makes up for.
_AUXILIARY = {"inception_v3": ("AuxLogits",), "googlenet": ("aux1", "aux2")}
_WITHOUT_AUXILIARY = {"aux_logits": False, "transform_input": True, "init_weights": False}

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Transforms:
    """What makes a tensor `[3, H, W]` of a PIL image, for evaluation and calibration, and for fine-tuning."""

    evaluation: Transform
    training: Transform


def build(options: TaskOptions) -> TaskSetup:
    """The network `options.model`, trained, and the images of `options.data_dir`.

    Raises `TaskError` where a folder, a network or its weights are missing or do not fit one another.
    """
    if options.data_dir is None:
        raise TaskError("the imagenet task needs data_dir=DIR: a folder that holds train/<class>/ and val/<class>/")
    if options.model is None:
        raise TaskError(f"the imagenet task needs model=NAME: {KINDS}")
    try:
        import torchvision  # noqa: F401 - all transforms are its
    except ImportError as error:
        raise TaskError(f"the imagenet task needs torchvision ({error}); pip install 'tracequant[vision]'") from None
    classes = class_names(options.data_dir)
    kind, _, name = options.model.partition(":")
    with torch.random.fork_rng(devices=[]):
        if kind == "torchvision":
            model, transforms = _torchvision(name, options, len(classes))
        elif kind == "timm":
            model, transforms = _timm(name, options, len(classes))
        elif kind in ("squeezenext", "squeezenext-23", "squeezenext-23v5"):
            model, transforms = _squeezenext(options.model, options, len(classes))
        else:
            raise TaskError(f"unknown model {options.model!r}; choose {KINDS}")
    if options.image_size is not None:
        _try_size(model.eval(), options.image_size, options.model)
    return image_folder(model, transforms, options)


def image_folder(
    model: nn.Module, transforms: Transforms, options: TaskOptions, task: ClassificationTask | None = None
) -> TaskSetup:
    """The setup of a trained network that classifies the images of `options.data_dir`.

    Calibration images are drawn from `train` by `options.seed`, 512 unless `options.samples` says otherwise.
    """
    assert options.data_dir is not None
    folder = Path(options.data_dir)
    classes = class_names(folder)
    plain = ImageTree(folder / "train", classes, transforms.evaluation)
    augmented = ImageTree(folder / "train", classes, transforms.training)
    evaluation = ImageTree(folder / "val", classes, transforms.evaluation)
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(options.seed))
    chosen = order[: options.samples or SAMPLES].tolist()
    batch_size = options.batch_size or BATCH_SIZE
    workers = WORKERS if options.workers is None else options.workers

    def loader(images: Dataset[tuple[Tensor, int]], **how: Any) -> DataLoader[tuple[Tensor, int]]:
        pinned = torch.cuda.is_available()
        return DataLoader(images, batch_size, num_workers=workers, pin_memory=pinned, **how)

    return TaskSetup(
        model=model.eval(),
        task=ClassificationTask() if task is None else task,
        calibration=loader(Subset(plain, chosen)),
        # A last batch of few images would disturb BatchNorm.
        train=loader(augmented, shuffle=True, drop_last=len(augmented) >= batch_size),
        evaluation=loader(evaluation),
    )


def standard_transforms(
    size: int = 224,
    crop_share: float = 0.875,
    mean: Sequence[float] = MEAN,
    deviation: Sequence[float] = DEVIATION,
    *,
    interpolation: Any = None,
) -> Transforms:
    """`size` pixels from the centre, a share of the shorter side; in fine-tuning a random crop, mirrored or not.

    `mean` and `deviation` are of pixels from 0 to 1; `interpolation` is torchvision's, bilinear by default.
    """
    from torchvision import transforms

    interpolation = transforms.InterpolationMode.BILINEAR if interpolation is None else interpolation
    to_tensor = [
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize(list(mean), list(deviation)),
    ]
    cut = [transforms.Resize(round(size / crop_share), interpolation), transforms.CenterCrop(size)]
    random = [transforms.RandomResizedCrop(size, interpolation=interpolation), transforms.RandomHorizontalFlip()]
    return Transforms(transforms.Compose(cut + to_tensor), transforms.Compose(random + to_tensor))


def class_names(folder: str | Path) -> list[str]:
    """The classes in the order of their numbers: the lines of `classes.txt`, else the folders in `train`, sorted."""
    folder = Path(folder)
    for name in ("train", "val"):
        if not (folder / name).is_dir():
            raise TaskError(f"{folder} has no folder {name!r}; expected train/<class>/*.jpg and val/<class>/*.jpg")
    listed = folder / "classes.txt"
    if listed.is_file():
        names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
        if not names or len(set(names)) != len(names):
            raise TaskError(f"{listed} must have the folder of one class in each line, each once")
        return names
    names = _folders(folder / "train")
    if not names:
        raise TaskError(f"{folder / 'train'} holds no class folders; expected train/<class>/*.jpg")
    return names


def _folders(root: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones left out, sorted."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


class ImageTree(Dataset[tuple[Tensor, int]]):
    """The images of `root/<class>/`, numbered as in `classes`; some classes may have none.

    torchvision's ImageFolder would number the classes that it finds. Raises `TaskError` for a folder that is no class
    and where there are no images at all.
    """

    def __init__(self, root: Path, classes: Sequence[str], transform: Transform) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        strange = sorted(set(_folders(root)) - set(classes))
        if strange:
            raise TaskError(
                f"{root} has {len(strange)} folders that are none of the {len(classes)} classes:"
                f" {', '.join(strange[:3])}; classes are the folders of train, or the lines of"
                f" {root.parent / 'classes.txt'}"
            )
        numbers = {name: number for number, name in enumerate(classes)}
        self.images = make_dataset(str(root), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        if not self.images:
            raise TaskError(f"{root} holds no images ({', '.join(IMG_EXTENSIONS)}) in its class folders")
        self._transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, number = self.images[index]
        try:
            with Image.open(path) as picture:
                image = picture.convert("RGB")
        except (OSError, SyntaxError) as error:  # what PIL makes of damaged files
            raise DataError(f"image {path} cannot be read: {error}") from None
        return self._transform(image), number


def _torchvision(name: str, options: TaskOptions, classes: int) -> tuple[nn.Module, Transforms]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise _unknown("torchvision", name, names)
    published = torchvision.models.get_model_weights(name)
    file = _weights_file(options)
    if file is not None:
        auxiliary = _AUXILIARY.get(name, ())
        more = _WITHOUT_AUXILIARY if auxiliary else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=classes, **more)
        _load(model, file, options, classes, ignored=auxiliary)
        preset = next(iter(published)).transforms()
    else:
        if options.weights is not None and options.weights not in published.__members__:
            raise TaskError(
                f"weights {options.weights!r} are neither a file nor published for torchvision's {name}; choose"
                f" {', '.join(published.__members__)}, or give a file"
            )
        weights = published[options.weights] if options.weights is not None else published.DEFAULT
        if weights.meta["categories"] is None:
            raise TaskError(f"weights {weights.name} of torchvision's {name} have no classes; choose others")
        _check_classes(len(weights.meta["categories"]), options, classes)
        model = _downloaded(lambda: torchvision.models.get_model(name, weights=weights), options)
        for head in _AUXILIARY.get(name, ()):
            setattr(model, head, None)
            setattr(model, "aux_logits", False)  # noqa: B010 - a plain attribute of these two alone
        preset = weights.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return model, standard_transforms(
        options.image_size or crop,
        options.crop_share or crop / resize,
        preset.mean,
        preset.std,
        interpolation=preset.interpolation,
    )


def _timm(name: str, options: TaskOptions, classes: int) -> tuple[nn.Module, Transforms]:
    try:
        import timm
    except ImportError as error:
        raise TaskError(f"models of timm need timm ({error}); pip install 'tracequant[vision]'") from None
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    file = _weights_file(options)
    if file is not None:
        model = timm.create_model(name, num_classes=classes)
        _load(model, file, options, classes)
    elif options.weights is not None:
        raise TaskError(
            f"weights file {options.weights} does not exist; timm's own are chosen by name, such as"
            " model=timm:resnet50.a1_in1k; leave weights out then"
        )
    else:
        model = _downloaded(lambda: timm.create_model(name, pretrained=True), options)
        _check_classes(int(cast(Any, model).num_classes), options, classes)
    config = timm.data.resolve_model_data_config(model)
    if options.image_size is not None:
        config["input_size"] = (3, options.image_size, options.image_size)
    if options.crop_share is not None:
        config["crop_pct"] = options.crop_share
    evaluation = timm.data.create_transform(**config, is_training=False)
    mode = timm.data.transforms.str_to_interp_mode(config["interpolation"])
    size = config["input_size"][-1]
    training = standard_transforms(size, 1.0, config["mean"], config["std"], interpolation=mode).training
    return cast(nn.Module, model), Transforms(evaluation, training)


def _squeezenext(spec: str, options: TaskOptions, classes: int) -> tuple[nn.Module, Transforms]:
    kind, _, width = spec.partition(":")
    if width not in ("", "1.0", "1.5", "2.0"):
        raise TaskError(f"unknown width {width!r} of {kind}; choose 1.0, 1.5 or 2.0")
    file = _weights_file(options)
    if file is None:
        raise TaskError(
            f"{spec} has no weights that can be fetched from here; give weights=FILE (the checkpoints of pytorchcv's"
            " sqnxt23_w2 and its like fit)"
        )
    version: squeezenext.Version = "23v5" if kind.endswith("v5") else "23"
    model = squeezenext.SqueezeNext(float(width or 2.0), version, classes)
    _load(model, file, options, classes)
    return model, standard_transforms(options.image_size or 224, options.crop_share or 0.875)


def _try_size(model: nn.Module, size: int, name: str) -> None:
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise TaskError(
            f"{name} cannot take images of {size}x{size} pixels ({str(error).splitlines()[0]}); give another"
            " image_size, or leave it out for that of the weights"
        ) from None


def _weights_file(options: TaskOptions) -> str | None:
    """`options.weights` if it is a file or looks like one; None if it is the name of published weights, or absent."""
    weights = options.weights
    if weights is not None and (Path(weights).is_file() or Path(weights).suffix or os.sep in weights):
        return weights
    return None


def _load(model: nn.Module, file: str, options: TaskOptions, classes: int, ignored: Sequence[str] = ()) -> None:
    state = {name: tensor for name, tensor in read_state(file).items() if name.partition(".")[0] not in ignored}
    hint = (
        f"{options.model} was built for the {classes} classes of {options.data_dir}: see that the model is the network"
        " of these weights, and that the folder, or its classes.txt, has all of their classes"
    )
    load_state(model, state, file, hint)


def _downloaded(create: Callable[[], Any], options: TaskOptions) -> nn.Module:
    try:
        return cast(nn.Module, create())
    except (OSError, RuntimeError, ValueError) as error:
        raise TaskError(
            f"trained weights of {options.model} cannot be fetched ({str(error).splitlines()[0]}); without a network"
            " give weights=FILE"
        ) from None


def _check_classes(logits: int, options: TaskOptions, classes: int) -> None:
    if logits != classes:
        raise TaskError(
            f"{options.model} has {logits} outputs and {options.data_dir} {classes} classes; name all classes in"
            " classes.txt, in the network's order, or give weights=FILE of a network for these"
        )


def _unknown(library: str, name: str, names: Sequence[str]) -> TaskError:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return TaskError(f"{library} has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
