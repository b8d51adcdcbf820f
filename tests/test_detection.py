"""Detection: losses, matching and detections as torchvision's, traces of images of different sizes, COCO's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import tracequant as tq
from models import exact_hessian, snapshot
from tracequant.core.errors import DataError, TaskError
from tracequant.core.match import match_names
from tracequant.curvature.output_factors import OutputHessian
from tracequant.curvature.output_hessian import factor
from tracequant.model.discover import quantizable_names
from tracequant.model.task import total_loss

torchvision = pytest.importorskip("torchvision", reason="RetinaNet is torchvision's")

from detectors import CLASSES, scenes, tiny_retinanet  # noqa: E402
from tracequant.tasks.coco import coco_metrics  # noqa: E402
from tracequant.tasks.networks.retinanet import retinanet, retinanet_blocks  # noqa: E402

TASK = tq.RetinaNetTask()
SIZES = ((16, 16), (16, 24), (16, 16))


def without_boxes(target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"boxes": target["boxes"][:0], "labels": target["labels"][:0]}


class Caller(nn.Module):
    """The task's outputs as a module's call, so that `torch.func` can put other weights into the network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> Any:
        return TASK.outputs(self.inner, batch)


def training_losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What the network's own call gives in training, BatchNorm's statistics as they are."""
    model.train()
    model.backbone.eval()
    losses: dict[str, Tensor] = model(*batch)
    return losses


def exact_weight_trace(model: nn.Module, batch: Any, name: str) -> float:
    """The trace of the exact Hessian of a batch's loss by one layer's weight."""
    weight = model.get_submodule(name).weight.detach()

    def loss(flat: Tensor) -> Tensor:
        outputs = functional_call(Caller(model), {f"inner.{name}.weight": flat.view_as(weight)}, (batch,))
        return total_loss(TASK, outputs, batch)

    return exact_hessian(loss, weight.flatten()).trace().item()


def exact_activation_trace(model: nn.Module, batch: Any, consumers: tuple[str, ...]) -> float:
    """The trace of the exact Hessian of a batch's loss by all tensors that the modules read, each tensor by itself."""
    read: list[Tensor] = []

    def hook_all(hook: Callable[..., Any]) -> list[Any]:
        return [model.get_submodule(name).register_forward_pre_hook(hook) for name in consumers]

    handles = hook_all(lambda module, args: None if any(args[0] is x for x in read) else read.append(args[0]))
    TASK.outputs(model, batch)
    for handle in handles:
        handle.remove()
    total = 0.0
    for number, tensor in enumerate(read):
        levels = [x.shape for x in read]
        assert len(set(levels)) == len(levels), "the tensors of a point are told apart by their shapes"

        def loss(flat: Tensor, shape: torch.Size = tensor.shape) -> Tensor:
            handles = hook_all(lambda module, args: args[0] + flat.view(shape) if args[0].shape == shape else None)
            try:
                return total_loss(TASK, TASK.outputs(model, batch), batch)
            finally:
                for handle in handles:
                    handle.remove()

        total += exact_hessian(loss, torch.zeros(read[number].numel(), dtype=tensor.dtype)).trace().item()
    return total


@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1"])
def test_losses_and_detections_are_torchvisions(box_loss: Any) -> None:
    model, batch = tiny_retinanet(), scenes((16, 24), (16, 24), (16, 24))
    batch[1][2] = without_boxes(batch[1][2])
    task = tq.RetinaNetTask(box_loss, beta=1.0)  # torchvision's own, where it is asked for smooth L1
    model.head.regression_head._loss_type = box_loss
    own = task.loss(task.outputs(model, batch), batch)
    torch.testing.assert_close(own, training_losses(model, batch), rtol=1e-6, atol=0)
    for found, wanted in zip(task.detect(model.eval(), batch[0]), model(batch[0]), strict=True):
        assert len(wanted["boxes"]) > 5
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_an_image_that_is_scaled_has_the_loss_and_the_detections_of_its_own_pixels() -> None:
    model, batch = tiny_retinanet(), scenes((32, 48))  # scaled to 16 x 24
    own = tq.RetinaNetTask("l1").loss(tq.RetinaNetTask().outputs(model, batch), batch)
    torch.testing.assert_close(own, training_losses(model, batch), rtol=1e-4, atol=0)
    (found,), (wanted,) = TASK.detect(model.eval(), batch[0]), model(batch[0])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_outputs_and_loss_of_an_image_do_not_depend_on_its_batch() -> None:
    model, batch = tiny_retinanet().requires_grad_(False), scenes(*SIZES)
    together = TASK.outputs(model, batch)
    losses = []
    for n in range(3):
        single = TASK.select(batch, n, n + 1)
        alone = TASK.outputs(model, single)
        anchors = alone["level"].shape[1]
        for name, value in alone.items():
            torch.testing.assert_close(together[name][n, :anchors], value[0], rtol=1e-12, atol=1e-12)
        assert (together["level"][n, anchors:] == -1).all()
        losses.append(TASK.loss(alone, single))
    assert (together["level"] == -1).any()
    for term, value in TASK.loss(together, batch).items():
        assert float(value) == pytest.approx(sum(float(own[term]) for own in losses) / 3)


def test_a_batch_falls_apart_by_size() -> None:
    batch = scenes(*SIZES)
    parts = TASK.parts(batch)
    assert [[tuple(image.shape[1:]) for image in images] for images, _ in parts] == [[(16, 16)] * 2, [(16, 24)]]
    assert parts[0][1][1] is batch[1][2]
    uniform = scenes((16, 16), (16, 16))
    assert TASK.parts(uniform) == [uniform]


def test_a_focal_loss_bends_both_ways() -> None:
    model, batch = tiny_retinanet(), scenes((16, 16))
    hessian = factor(TASK, TASK.outputs(model, batch), batch, torch.Generator().manual_seed(0))
    assert isinstance(hessian, OutputHessian)
    classes = hessian.first[0]
    assert (classes > 0).any()
    assert (classes < 0).any()


def test_traces_of_weights_are_those_of_the_exact_hessian() -> None:
    model, batch = tiny_retinanet(), scenes((16, 16), (16, 16))
    layers = ["backbone.down", "head.classification_head.conv.0.0", "head.regression_head.bbox_reg"]
    points = tq.discover(model, [batch], TASK, include=layers)
    before = snapshot(model)
    found = tq.estimate_curvature(
        model, [batch], TASK, estimator="gauss_newton", num_probes="exact", points=points, activations=False
    )
    assert snapshot(model) == before
    probed = tq.estimate_curvature(
        model, [batch], TASK, estimator="hutchinson", num_probes=60, points=points, activations=False
    )
    for name in layers:
        exact = exact_weight_trace(model, batch, name)
        assert found.weights[name].trace == pytest.approx(exact, rel=1e-9)
        assert abs(probed.weights[name].trace - exact) < 4 * probed.weights[name].standard_error


def test_traces_of_images_of_different_sizes_are_each_images_own() -> None:
    model, batch = tiny_retinanet(), scenes(*SIZES)
    names = ["head.classification_head.conv.0.0", "head.regression_head.conv.0.0", "head.regression_head.conv.2.0"]
    points = tq.discover(model, [batch], TASK, include=names)
    found = tq.estimate_curvature(model, [batch], TASK, estimator="gauss_newton", num_probes="exact", points=points)
    in_order = (0, 2, 1)  # the images of one size, then the other
    for point in points.activations:
        exact = [
            exact_activation_trace(model, TASK.select(batch, n, n + 1), point.consumers) for n in range(len(SIZES))
        ]
        assert found.activation_values is not None
        assert found.activation_values[point.name] == pytest.approx([exact[n] for n in in_order], rel=1e-9)
        estimate = found.activations[point.name]
        assert estimate.trace == pytest.approx(sum(exact) / 3, rel=1e-9)
        # Three channels at strides 4 and 8.
        assert estimate.numel == 3 * (2 * (16 + 4) + (24 + 6)) / 3
    reversed_batch = (batch[0][::-1], batch[1][::-1])
    again = tq.estimate_curvature(
        model, [reversed_batch], TASK, estimator="gauss_newton", num_probes="exact", points=points
    )
    for name, estimate in found.activations.items():
        assert again.activations[name].trace == pytest.approx(estimate.trace, rel=1e-9)
    for name, estimate in found.weights.items():
        assert again.weights[name].trace == pytest.approx(estimate.trace, rel=1e-9)
        exact_weight = exact_weight_trace(model, batch, name)
        assert estimate.trace == pytest.approx(exact_weight, rel=1e-9)


def test_auto_takes_gauss_newton() -> None:
    model, batch = tiny_retinanet(), scenes((16, 16), (16, 16))
    found = tq.estimate_curvature(model, [batch], TASK, num_probes=1, activations=False)
    assert found.estimator == "gauss_newton", found.reason
    assert "diagonal output Hessian" in found.reason


def test_an_absolute_box_error_gives_the_box_branch_no_trace() -> None:
    model, batch = tiny_retinanet(), scenes((16, 16))
    names = ["head.classification_head.conv.0.0", "head.regression_head.conv.0.0"]
    task = tq.RetinaNetTask("l1")
    points = tq.discover(model, [batch], task, include=names)
    found = tq.estimate_curvature(model, [batch], task, estimator="gauss_newton", points=points, activations=False)
    assert found.weights[names[0]].trace != 0
    assert found.weights[names[1]].trace == 0


def test_the_image_that_the_model_normalises_is_its_input() -> None:
    model, batch = tiny_retinanet(), scenes((16, 16))
    flags = {point.name: point.is_model_input for point in tq.discover(model, [batch], TASK).activations}
    assert flags.pop("backbone.stem")
    assert not any(flags.values())


def test_features_are_one_point_for_both_heads_and_heads_one_layer_for_all_levels() -> None:
    points = tq.discover(tiny_retinanet(), [scenes((16, 16))], TASK)
    shared = points.activation_by_name["backbone.down"]
    heads = ("head.classification_head.conv.0.0", "head.regression_head.conv.0.0")
    assert shared.consumers == ("backbone.down", *heads)
    assert shared.numel == 3 * (16 + 4)
    assert points.by_name[heads[0]].macs == 3 * 27 * (16 + 4)


def test_crowds_are_matched_by_nothing() -> None:
    model, batch = tiny_retinanet(), scenes((16, 16))
    outputs = TASK.outputs(model, batch)
    (target,) = batch[1]
    crowded = [target | {"iscrowd": torch.tensor([0, 1, 1])}]
    alone = [{name: value[:1] for name, value in target.items()}]
    assert TASK.loss(outputs, (batch[0], crowded)) == TASK.loss(outputs, (batch[0], alone))
    assert TASK.loss(outputs, (batch[0], crowded)) != TASK.loss(outputs, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, CLASSES])}, "label 2; the model has 2 classes, numbered 0 to 1"),
        ({"labels": torch.tensor([0, 1])}, r"boxes of shape \[3, 4\] and labels of shape \[2\]"),
        ({"boxes": torch.tensor([[8.0, 8, 4, 4]] * 3)}, r"without area; boxes are \[x1, y1, x2, y2\]"),
    ],
)
def test_targets_that_cannot_be(change: dict[str, Tensor], message: str) -> None:
    model, batch = tiny_retinanet(), scenes((16, 16))
    batch[1][0] |= change
    with pytest.raises(DataError, match=message):
        TASK.check(TASK.outputs(model, batch), batch)


def test_other_batches_models_and_settings_are_refused() -> None:
    with pytest.raises(TaskError, match="expects batches"):
        TASK.batch_size((torch.zeros(2, 3, 8, 8), [{}]))
    with pytest.raises(TaskError, match="got a Linear"):
        TASK.outputs(nn.Linear(1, 1), scenes((16, 16)))
    with pytest.raises(TaskError, match="expected box_loss in"):
        tq.RetinaNetTask("giou")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no labels"):
        TASK.check(TASK.outputs(tiny_retinanet(), scenes((16, 16))), ([torch.zeros(3, 16, 16)], [{"boxes": 0}]))


def test_distillation_is_zero_at_the_teacher_and_ignores_anchors_that_fill_up() -> None:
    model, batch = tiny_retinanet(), scenes(*SIZES)
    teacher = TASK.outputs(tiny_retinanet(seed=1), batch)
    assert TASK.distillation_loss(teacher, teacher, batch).item() == 0
    outputs = TASK.outputs(model, batch)
    distance = TASK.distillation_loss(outputs, teacher, batch)
    assert distance.item() > 0
    alone = [
        TASK.distillation_loss(TASK.outputs(model, own), TASK.outputs(tiny_retinanet(seed=1), own), own)
        for own in (TASK.select(batch, n, n + 1) for n in range(3))
    ]
    assert distance.item() == pytest.approx(torch.stack(alone).mean().item())


def test_evaluation_counts_images_of_all_batches_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_retinanet()
    batches = [scenes(*SIZES), scenes((16, 16))]
    before = snapshot(model)
    result = TASK.evaluate(model, batches)
    assert snapshot(model) == before
    assert capsys.readouterr() == ("", "")
    assert (result.metric_name, result.samples) == ("mAP %", 4)
    with torch.no_grad():
        parts = [(TASK.loss(TASK.outputs(model, b), b), len(b[0])) for b in batches]
    assert result.loss == pytest.approx(sum(sum(map(float, own.values())) * n for own, n in parts) / 4)
    images = [image for b in batches for part in TASK.parts(b) for image in part[0]]
    targets = [target for b in batches for part in TASK.parts(b) for target in part[1]]
    found = [TASK.detect(model, [image])[0] for image in images]
    wanted = coco_metrics(targets, found, CLASSES)
    assert result.metric == wanted["AP"]
    assert result.details == {name: value for name, value in wanted.items() if not math.isnan(value)}
    assert TASK.metric(TASK.outputs(model, batches[1]), batches[1]) >= 0


def test_coco_metrics_of_known_detections() -> None:
    boxes = torch.tensor([[0.0, 0, 40, 40], [50, 50, 150, 150]])
    truth = [{"boxes": boxes, "labels": torch.tensor([0, 1])}]
    perfect = [{**truth[0], "scores": torch.tensor([0.9, 0.8])}]
    metrics = coco_metrics(truth, perfect, 3)
    assert metrics["AP"] == pytest.approx(100)
    assert math.isnan(metrics["AP small"])
    one = coco_metrics(truth, [{name: value[:1] for name, value in perfect[0].items()}], 3)
    assert one["AP"] == pytest.approx(50)
    # Half as wide: an overlap of 0.5 counts at the first of the ten thresholds only.
    half = [{"boxes": boxes * torch.tensor([1, 1, 0.5, 1]), **{k: perfect[0][k] for k in ("labels", "scores")}}]
    half[0]["boxes"][1] = torch.tensor([50.0, 50, 150, 100])
    assert coco_metrics(truth, half, 3)["AP"] == pytest.approx(10)
    assert coco_metrics(truth, half, 3)["AP50"] == pytest.approx(100)
    none = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}]
    assert coco_metrics(truth, none, 3)["AP"] == 0


def test_a_crowd_is_neither_found_nor_missed() -> None:
    boxes = torch.tensor([[0.0, 0, 40, 40], [50, 50, 150, 150]])
    truth = [{"boxes": boxes, "labels": torch.tensor([0, 0]), "iscrowd": torch.tensor([0, 1])}]
    found = [{"boxes": boxes[:1], "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}]
    assert coco_metrics(truth, found, 1)["AP"] == pytest.approx(100)
    only_crowd = [{name: value[1:] for name, value in truth[0].items()}]
    with pytest.raises(DataError, match="no box"):
        coco_metrics(only_crowd, found, 1)


@pytest.mark.filterwarnings("ignore:.*not significantly above zero")
def test_from_analysis_to_a_packed_file_with_ties_and_mixed_activations(tmp_path: Path) -> None:
    model = tiny_retinanet(dtype=torch.float32)
    batches = [scenes(*SIZES, dtype=torch.float32), scenes((16, 16), dtype=torch.float32)]
    ties = ["head.classification_head.*", "head.regression_head.*"]
    points = tq.discover(model, batches, TASK, ties=ties)
    curvature = tq.estimate_curvature(model, batches, TASK, estimator="gauss_newton", points=points)
    sensitivity = tq.measure_sensitivity(
        model, batches, TASK, curvature, weight_bits=(2, 4, 8), activation_bits=(2, 3, 6)
    )
    plan = tq.solve(sensitivity, compression=8.0, activation_compression=5.6)
    for head in ("classification_head", "regression_head"):
        assert len({bits for name, bits in plan.weight_bits.items() if head in name}) == 1
    assert plan.compression >= 8
    inner = {name: bits for name, bits in plan.activation_bits.items() if name != "backbone.stem"}
    assert plan.activation_bits["backbone.stem"] == 8
    assert len(set(inner.values())) > 1
    assert set(inner.values()) <= {2, 3, 6}
    quantized = tq.quantize(model, batches, TASK, plan)
    result = tq.finetune(quantized, batches, TASK, steps=3, learning_rate=1e-3, teacher=model, batchnorm="freeze")
    assert len(result.losses) == 3
    assert all(math.isfinite(loss) for loss in result.losses)
    tq.pack(quantized, tmp_path / "model.safetensors")
    loaded = tq.load(tmp_path / "model.safetensors", model)
    for batch in batches:
        outputs, again = TASK.outputs(quantized.eval(), batch), TASK.outputs(loaded, batch)
        assert all(torch.equal(outputs[name], again[name]) for name in outputs)


@pytest.mark.filterwarnings("ignore:.*not significantly above zero")
def test_onnx_has_the_heads_for_images_of_any_size(tmp_path: Path) -> None:
    """A runtime's heads in the place of the model's give the same outputs and losses, and the mAP of these outputs.

    The mAP of the model itself depends on which of two nearly equal scores is higher, and so on the last bits.
    """
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX files are run by the extra 'onnx'")
    from tracequant.deploy.verify import verify

    class InRuntime(nn.Module):
        """The heads by ONNX Runtime, with its fused kernels or by the graph's own arithmetic."""

        def __init__(self, fused: bool) -> None:
            super().__init__()
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            if not fused:
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.session = onnxruntime.InferenceSession(
                tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
            )

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            name = self.session.get_inputs()[0].name
            return tuple(map(torch.from_numpy, self.session.run(None, {name: images.numpy()})))

    model = tiny_retinanet(dtype=torch.float32)
    batches = [scenes(*SIZES, dtype=torch.float32), scenes((32, 16), (24, 24), dtype=torch.float32)]
    points = tq.discover(model, batches, TASK)
    curvature = tq.estimate_curvature(model, batches, TASK, estimator="gauss_newton", points=points)
    plan = tq.solve(
        tq.measure_sensitivity(model, batches, TASK, curvature, weight_bits=(4, 8), activation_bits=(8,)),
        average_bits=5,
    )
    quantized = tq.quantize(model, batches, TASK, plan).eval()
    part = TASK.exported(quantized)
    args, _ = part.arguments(batches[0])
    tq.export_onnx(part.module, tmp_path / "model.onnx", args, dynamic_sizes=part.dynamic_sizes)
    found = verify(quantized, batches, TASK, tmp_path / "model.onnx", float_model=model, promised_bytes=1000, repeats=1)
    assert found.samples == 5
    assert found.difference < 1e-5
    assert found.metric == TASK.evaluate(quantized, batches).metric
    assert found.runtimes[0].metric == TASK.evaluate(part.replaced(InRuntime(fused=True)), batches).metric
    # A fused kernel may round a value between two codes to the other one, and adds up in 16 bits on some processors.
    for fused, tolerance in ((False, 1e-5), (True, 0.2)):
        replaced = part.replaced(InRuntime(fused))
        for batch in batches:
            with torch.no_grad():
                outputs, theirs = TASK.outputs(quantized, batch), TASK.outputs(replaced, batch)
                losses, their_losses = TASK.loss(outputs, batch), TASK.loss(theirs, batch)
            for name in ("cls_logits", "bbox_regression"):
                assert (outputs[name] - theirs[name]).abs().max() < tolerance * outputs[name].abs().max()
            for name, loss in losses.items():
                assert float(their_losses[name]) == pytest.approx(float(loss), rel=10 * tolerance)
    assert found.runtimes[0].equal_predictions is None
    kernels = {kernel.layer: kernel for kernel in found.kernels}
    assert kernels["backbone.stem"].kernel == "QLinearConv"
    # Another network is noticed.
    other = verify(
        tiny_retinanet(1, torch.float32),
        batches,
        TASK,
        tmp_path / "model.onnx",
        float_model=model,
        promised_bytes=1,
        repeats=1,
    )
    assert other.difference > 0.01


def test_a_runtime_computes_the_heads_in_the_models_place() -> None:
    class Shifted(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            logits, boxes = part.module(images)
            return logits + 1, 2 * boxes

    model, batch = tiny_retinanet(), scenes(*SIZES)
    part = TASK.exported(model)
    outputs, replaced = TASK.outputs(model, batch), TASK.outputs(part.replaced(Shifted()), batch)
    assert torch.equal(
        replaced["cls_logits"], torch.where(outputs["level"][..., None] < 0, 0, outputs["cls_logits"] + 1)
    )
    assert torch.equal(replaced["bbox_regression"], 2 * outputs["bbox_regression"])
    assert torch.equal(replaced["anchors"], outputs["anchors"])
    assert TASK.outputs(model, batch)["cls_logits"].equal(outputs["cls_logits"]), "the model itself was changed"


def test_blocks_cover_every_layer_once() -> None:
    with torch.device("meta"):
        model = retinanet("torchvision:retinanet_resnet50_fpn", 91)
    ties = retinanet_blocks(model)
    # The paper's 22 (stem and 16 blocks, 3 levels, 2 heads), and the two levels on top of the pyramid.
    assert len(ties) == 23
    names = quantizable_names(model)
    assert sorted(name for pattern in ties for name in match_names([pattern], names, "tie")) == sorted(names)
    assert match_names(["backbone.fpn.*_blocks.1.*"], names, "tie") == [
        "backbone.fpn.inner_blocks.1.0", "backbone.fpn.layer_blocks.1.0",
    ]  # fmt: skip
    # torchvision's own count, without the frozen BatchNorm.
    assert sum(p.numel() for p in model.parameters()) == 34_014_999


@pytest.mark.parametrize("name", ["retinanet_resnet18_fpn", "retinanet_mobilenet_v2_fpn"])
def test_other_backbones(name: str) -> None:
    model = retinanet(name, 3).eval()
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)], "BatchNorm is not frozen"
    assert all(p.requires_grad for p in model.parameters())
    model.transform.min_size, model.transform.max_size = (64,), 64
    (found,) = TASK.detect(model, [torch.rand(3, 64, 64)])
    assert found["boxes"].shape[1] == 4
    assert "head.regression_head.*" in retinanet_blocks(model)


@pytest.mark.parametrize("name", ["resnet50", "retinanet_resnet51_fpn", "retinanet_resnet18_fpn_v2"])
def test_unknown_models(name: str) -> None:
    with pytest.raises(TaskError, match=f"unknown model '{name}'"):
        retinanet(name, 3)
