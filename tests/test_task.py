"""The Task interface: losses, metrics and checks of `ClassificationTask`, evaluation, and what it leaves behind."""

import copy
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from models import (
    CLASSES,
    attention_net,
    conv_net,
    gelu_mlp,
    images,
    labelled,
    snapshot,
    tied_net,
    token_batch,
)
from tracequant import ClassificationTask, DataError, Task, TaskError
from tracequant.model.batches import check_finite, reusable
from tracequant.model.device import model_device
from tracequant.model.task import checked, forward, total_loss

TASK = ClassificationTask()


class DetectionTask(Task):
    """Images of different sizes in a list, one target each; the loss is a dictionary of two terms."""

    metric_name = "hits"

    def outputs(self, model: nn.Module, batch: Any) -> list[Tensor]:
        return [model(image[None])[0] for image in batch["images"]]

    def loss(self, outputs: list[Tensor], batch: Any) -> dict[str, Tensor]:
        logits = torch.stack(outputs)
        return {"class": F.cross_entropy(logits, batch["targets"]), "size": 0.5 * logits.square().mean()}

    def metric(self, outputs: list[Tensor], batch: Any) -> float:
        return float((torch.stack(outputs).argmax(1) == batch["targets"]).double().mean())

    def batch_size(self, batch: Any) -> int:
        return len(batch["images"])


def detection_batch(*sizes: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(height for height, _ in sizes))
    return {
        "images": [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in sizes],
        "targets": torch.randint(0, CLASSES, (len(sizes),), generator=generator),
    }


# Losses


def test_the_users_loss_is_the_one_that_is_called():
    calls = []

    def hinge(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append((tuple(logits.shape), tuple(targets.shape)))
        return F.multi_margin_loss(logits, targets)

    model = gelu_mlp()
    ((inputs, targets),) = labelled(6)
    evaluation = ClassificationTask(loss=hinge).evaluate(model, [(inputs, targets)])
    assert calls == [((4, CLASSES), (4,))]
    assert evaluation.loss == F.multi_margin_loss(model(inputs), targets).item()
    assert evaluation.loss != F.cross_entropy(model(inputs), targets).item()


def test_a_mapping_of_inputs_becomes_keyword_arguments():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, CLASSES)

        def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
            return self.fc(left - 2 * right)

    model = Two()
    left, right = torch.randn(2, 4, 3)
    outputs = TASK.outputs(model, ({"right": right, "left": left}, torch.zeros(4, dtype=torch.int64)))
    assert torch.equal(outputs, model.fc(left - 2 * right))


def test_forward_picks_the_logits():
    model = gelu_mlp()
    ((inputs, targets),) = labelled(6)
    task = ClassificationTask(forward=lambda model, inputs: model(inputs)[:, :3])
    assert torch.equal(task.outputs(model, (inputs, targets)), model(inputs)[:, :3])


def test_an_object_with_logits_is_unwrapped():
    """Transformer libraries return an object whose `logits` are the outputs."""

    class Wrapped(nn.Module):
        def forward(self, inputs: Tensor) -> Any:
            return type("Output", (), {"logits": inputs + 1})()

    assert torch.equal(TASK.outputs(Wrapped(), (torch.zeros(2, 3), torch.zeros(2))), torch.ones(2, 3))


def test_terms_of_a_dictionary_are_summed():
    batch = detection_batch((8, 8), (6, 10))
    outputs = DetectionTask().outputs(conv_net().eval(), batch)
    terms = DetectionTask().loss(outputs, batch)
    torch.testing.assert_close(total_loss(DetectionTask(), outputs, batch), terms["class"] + terms["size"])
    assert total_loss(DetectionTask(), outputs, batch).requires_grad


def test_a_loss_of_one_element_is_a_scalar():
    task = ClassificationTask(loss=lambda logits, targets: logits.square().mean().reshape(1, 1))
    assert total_loss(task, torch.full((2, 3), 2.0), (None, None)).shape == ()


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"a tensor of shape \[4\]"),
        (lambda o, t: 3.0, "a float"),
        (lambda o, t: None, "a NoneType"),
        (lambda o, t: (o.sum(), o), "a tuple of 2"),
        (lambda o, t: {}, "a dict"),
        (lambda o, t: {"class": F.cross_entropy(o, t), "each": F.cross_entropy(o, t, reduction="none")}, "returned"),
        (lambda o, t: {"class": F.cross_entropy(o, t), "weight": 0.5}, "returned"),
    ],
    ids=["vector", "float", "none", "tuple", "empty", "dictionary with a vector", "dictionary with a float"],
)
def test_a_loss_that_is_no_scalar_is_refused(loss: Callable, found: str):
    with pytest.raises(TaskError, match=r"ClassificationTask\.loss returned.*scalar") as error:
        ClassificationTask(loss=loss).evaluate(gelu_mlp(), labelled(6))
    assert error.match(found)


def test_distillation_is_the_divergence_from_the_teacher():
    """KL(teacher ‖ student) by its definition; the mean over positions, as of the loss; zero against itself."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 3), (4, 3, 5), (4, 3, 5, 6)):
        student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        p, q = teacher.softmax(1), student.softmax(1)
        expected = (p * (p / q).log()).sum(1).mean()
        for targets in (torch.zeros(4, *shape[2:], dtype=torch.long), p):  # classes, or their probabilities
            batch = (None, targets)
            torch.testing.assert_close(TASK.distillation_loss(student, teacher, batch), expected)
            assert TASK.distillation_loss(student, student, batch).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_distillation_leaves_out_the_positions_that_the_loss_leaves_out(ignore_index: int):
    task = ClassificationTask(ignore_index=ignore_index)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.zeros(4, 5, dtype=torch.long)
    targets[0, 1:] = targets[2] = ignore_index
    p, q = teacher.softmax(1), student.softmax(1)
    expected = (p * (p / q).log()).sum(1)[targets == 0].mean()
    torch.testing.assert_close(task.distillation_loss(student, teacher, (None, targets)), expected)
    nothing = torch.full_like(targets, ignore_index)
    assert task.distillation_loss(student, teacher, (None, nothing)).item() == 0


# Data that cannot be used


@pytest.mark.parametrize("batches", [[], iter([]), torch.utils.data.DataLoader([])], ids=["list", "iterator", "loader"])
def test_an_empty_loader_is_refused(batches):
    with pytest.raises(DataError, match="the loader yielded no batches"):
        TASK.evaluate(gelu_mlp(), batches)


def test_an_empty_batch_is_refused():
    with pytest.raises(DataError, match="batch 1 has no samples"):
        TASK.evaluate(gelu_mlp(), labelled(6, sizes=(2, 0)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused(value):
    batches = labelled(6, sizes=(4, 4))
    batches[1][0][2, :2] = value
    with pytest.raises(DataError, match=r"batch 1\[0\] holds 2 values that are NaN or infinite \(shape \[4, 6\]\)"):
        TASK.evaluate(gelu_mlp(), batches)


def test_the_place_of_a_bad_value_is_named():
    batch = detection_batch((4, 4), (5, 5))
    batch["images"][1][0, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"batch 7\['images'\]\[1\] holds 1 values"):
        check_finite(batch, 7)


@pytest.mark.parametrize("target", [CLASSES, -1])
def test_a_target_out_of_range_is_refused(target):
    ((inputs, targets),) = labelled(6)
    targets[2] = target
    with pytest.raises(DataError, match=f"target {target} is out of range: the model has 5 classes, numbered 0 to 4"):
        TASK.evaluate(gelu_mlp(), [(inputs, targets)])


def test_ignored_targets_and_soft_targets_are_let_through():
    ((inputs, targets),) = labelled(6)
    targets[0] = -100
    model = gelu_mlp()
    assert TASK.evaluate(model, [(inputs, targets)]).loss == F.cross_entropy(model(inputs[1:]), targets[1:]).item()
    soft = torch.full((4, CLASSES), 0.1, dtype=torch.float64)
    soft[:, 1] = 0.6
    assert TASK.evaluate(model, [(inputs, soft)]).loss == F.cross_entropy(model(inputs), soft).item()
    assert TASK.metric(F.one_hot(torch.tensor([1, 1, 1, 0]), CLASSES), (inputs, soft)) == 75.0


def test_targets_must_match_the_logits():
    ((inputs, targets),) = labelled(6)
    with pytest.raises(DataError, match="3 targets came with 4 rows of logits"):
        TASK.evaluate(gelu_mlp(), [(inputs, targets[:3])])


@pytest.mark.parametrize(
    ("batch", "found"), [(torch.zeros(2, 6), r"a tensor of shape \[2, 6\]"), ((1, 2, 3), "a tuple of 3")]
)
def test_batches_that_are_no_pairs_are_refused(batch, found):
    with pytest.raises(TaskError, match=rf"expects batches \(inputs, targets\) or dictionaries, got {found}"):
        TASK.evaluate(gelu_mlp(), [batch])


def test_outputs_that_are_no_logits_are_refused():
    task = ClassificationTask(forward=lambda model, inputs: [model(inputs)])
    with pytest.raises(TaskError, match=r"returned a list of 1, expected logits of shape \[N, classes\]"):
        task.evaluate(gelu_mlp(), labelled(6))


def test_a_loss_that_overflows_is_refused():
    model = gelu_mlp()
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    with pytest.raises(DataError, match="the loss is nan: the inputs are finite"):
        forward(TASK, model, labelled(6)[0])


# Evaluation


def test_evaluation_weights_batches_by_their_samples(device):
    """Against one pass over all samples: the mean over batches of different sizes is another number."""
    model = conv_net().to(device)
    batches = images(sizes=(5, 1, 2))
    evaluation = TASK.evaluate(model, batches)
    inputs, targets = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(inputs)
    hits = [int(logit.argmax()) == int(target) for logit, target in zip(logits, targets, strict=True)]
    assert evaluation.metric == pytest.approx(100 * sum(hits) / 8)
    assert evaluation.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-12)
    assert (evaluation.metric_name, evaluation.samples) == ("accuracy %", 8)
    each = [TASK.evaluate(model, [batch]) for batch in batches]
    assert evaluation.loss != pytest.approx(sum(e.loss for e in each) / 3, rel=1e-3)
    assert evaluation.metric != pytest.approx(sum(e.metric for e in each) / 3, rel=1e-3)


def test_evaluation_of_images_of_different_sizes():
    batches = [detection_batch((8, 8), (6, 10), (5, 5)), detection_batch((9, 4))]
    model = conv_net()
    evaluation = DetectionTask().evaluate(model, iter(batches))
    frozen = copy.deepcopy(model).eval()
    loss = hits = 0.0
    for batch in batches:
        logits = torch.cat([frozen(image[None]) for image in batch["images"]])
        size = len(logits)
        loss += F.cross_entropy(logits, batch["targets"], reduction="sum").item()
        loss += 0.5 * logits.square().mean().item() * size
        hits += (logits.argmax(1) == batch["targets"]).sum().item()
    assert evaluation.samples == 4
    assert evaluation.loss == pytest.approx(loss / 4, rel=1e-12)
    assert evaluation.metric == hits / 4


def test_accuracy_of_outputs_with_places():
    """Every token counts, as for `[N, C, T]` logits of a language model."""
    model = tied_net()
    tokens, targets = token_batch()
    hits = (model(tokens).argmax(1) == targets).double().mean().item()
    assert TASK.evaluate(model, [(tokens, targets)]).metric == pytest.approx(100 * hits)


class Noisy(nn.Module):
    """Dropout that stays on in evaluation, and a counter of calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.net(F.dropout(inputs, 0.1, training=True))


def test_evaluation_leaves_the_model_as_it_was():
    """Modes of each module, frozen parameters, gradients, buffers that are written, and the global random state."""
    model = Noisy().train()
    model.net.bn1.eval()
    model.net.conv1.weight.requires_grad_(False)
    model.net.conv1.weight.grad = torch.ones_like(model.net.conv1.weight)
    model.net.fc.weight.grad = torch.randn_like(model.net.fc.weight)
    before = snapshot(model)
    TASK.evaluate(model, images(sizes=(3, 2)))
    assert snapshot(model) == before


def test_a_buffer_that_the_model_replaces_is_put_back():
    """Assigning to a buffer, as caches do, exchanges the tensor; the caller's must be in its place afterwards."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, CLASSES).double()
            self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            self.mean = inputs.mean(0)
            return self.fc(inputs - self.mean)

    model = Caching()
    before = snapshot(model)
    TASK.evaluate(model, labelled(6))
    assert snapshot(model) == before


def test_evaluation_leaves_the_model_as_it_was_when_it_fails():
    model = conv_net().train()
    before = snapshot(model)
    batches = images(sizes=(2, 2))
    batches[1][1][0] = CLASSES
    with pytest.raises(DataError):
        TASK.evaluate(model, batches)
    assert snapshot(model) == before


def test_a_shuffling_loader_does_not_move_the_global_random_state():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images()[0]), batch_size=2, shuffle=True)
    model = conv_net()
    state = torch.get_rng_state()
    TASK.evaluate(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    list(loader)
    assert not torch.equal(torch.get_rng_state(), state)  # by itself the loader does


# Helpers of the other stages


def test_a_one_shot_iterator_becomes_a_list_and_a_loader_stays():
    batches = labelled(6, sizes=(1, 1))
    assert reusable(batches) is batches
    stored = reusable(iter(batches))
    assert list(stored) == list(stored) == batches


def test_checked_batches_are_on_the_models_device(device):
    model = attention_net().to(device)
    assert model_device(model).type == device.type
    (batch,) = checked([detection_batch((4, 4))], DetectionTask(), model)
    assert batch["images"][0].device.type == device.type
    assert batch["targets"].device.type == device.type


def test_a_model_without_tensors_is_on_the_cpu():
    assert model_device(nn.ReLU()) == torch.device("cpu")


def test_checked_batches_have_the_loaders_length():
    """Progress bars ask for it; a loader without a length has none here either."""
    assert len(checked(labelled(6, sizes=(1, 1, 1)), TASK, gelu_mlp())) == 3
    with pytest.raises(TypeError):
        len(checked(iter([]), TASK, gelu_mlp()))


def test_ignored_targets_may_lie_outside_and_do_not_count():
    task = ClassificationTask(ignore_index=255)
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    batch = (logits, torch.tensor([0, 255, 0]))
    task.check(logits, batch)
    assert task.metric(logits, batch) == 50.0
    with pytest.raises(DataError, match="ignore_index"):
        ClassificationTask().check(logits, batch)


class PaddedClassifier(nn.Module):
    """A transformer encoder with a padding mask, which torch's fused path turns into nested tensors."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder = nn.Embedding(9, 8), nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=ids == 0).mean(1))


def test_a_padded_encoder_goes_through_every_stage():
    torch.manual_seed(0)
    model, ids = PaddedClassifier().eval(), torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    batches, task = [(ids, torch.tensor([0, 2]))], ClassificationTask()
    curvature = tq.estimate_curvature(model, batches, task, num_probes=1, seed=1)
    sensitivity = tq.measure_sensitivity(model, batches, task, curvature, criterion="l2")
    quantized = tq.quantize(model, batches, task, tq.solve(sensitivity, average_bits=4))
    assert task.evaluate(quantized, batches).samples == 2
    assert torch.backends.mha.get_fastpath_enabled()


# Samples of a batch


Pair = namedtuple("Pair", "inputs targets")


class Counted(Task):
    """A task that knows a batch's size by a function."""

    def __init__(self, size: Callable[[Any], int]) -> None:
        self.batch_size = size  # type: ignore[method-assign]

    outputs = loss = metric = batch_size = lambda self, *_: 0  # type: ignore[assignment]


def rows(size: int, *shape: int) -> Tensor:
    return torch.arange(size * torch.Size(shape).numel()).reshape(size, *shape)


def boxes(size: int) -> list[dict[str, Tensor]]:
    """Targets of a detector: a different number of boxes for each image."""
    return [{"boxes": torch.full((i + 1, 4), i), "labels": torch.full((i + 1,), i)} for i in range(size)]


def pictures(size: int) -> list[Tensor]:
    return [torch.full((3, 4 + i, 5), i) for i in range(size)]


def second(batch: Any) -> int:
    return len(batch[1])


# The batch, how to count its samples, and samples 1 to 3 of it.
BATCHES: dict[str, tuple[Any, Callable[[Any], int], Any]] = {
    "tensor": (rows(4, 2), len, rows(4, 2)[1:3]),
    "pair": ((rows(4, 2), rows(4)), second, (rows(4, 2)[1:3], rows(4)[1:3])),
    "list of two fields": ([rows(4, 2), rows(4)], second, [rows(4, 2)[1:3], rows(4)[1:3]]),
    "named tuple": (Pair(rows(4, 2), rows(4)), lambda b: len(b.targets), Pair(rows(4, 2)[1:3], rows(4)[1:3])),
    "dictionary": (
        {"x": rows(4, 2), "mask": rows(4, 2) > 3, "scale": 0.5, "classes": rows(7)},
        lambda b: len(b["x"]),
        {"x": rows(4, 2)[1:3], "mask": rows(4, 2)[1:3] > 3, "scale": 0.5, "classes": rows(7)},
    ),
    "nested": (
        ({"ids": rows(4, 5), "more": (rows(4, 1), None)}, rows(4)),
        second,
        ({"ids": rows(4, 5)[1:3], "more": (rows(4, 1)[1:3], None)}, rows(4)[1:3]),
    ),
    "images of different sizes": ((pictures(4), rows(4)), second, (pictures(4)[1:3], rows(4)[1:3])),
    "images and boxes": ((pictures(4), boxes(4)), second, (pictures(4)[1:3], boxes(4)[1:3])),
    "images and boxes as tuples": (
        (tuple(pictures(4)), tuple(boxes(4))),
        second,
        (tuple(pictures(4)[1:3]), tuple(boxes(4)[1:3])),
    ),
    "list of samples": (pictures(4), len, pictures(4)[1:3]),
    "list of pairs": ([(rows(3), i) for i in range(4)], len, [(rows(3), 1), (rows(3), 2)]),
    "list of dictionaries": ([{"x": rows(7)}] * 4, len, [{"x": rows(7)}] * 2),
    "strings": ((["a", "b", "c", "d"], rows(4)), second, (["b", "c"], rows(4)[1:3])),
    "as many channels as samples": ((rows(4, 4, 4), rows(4)), second, (rows(4, 4, 4)[1:3], rows(4)[1:3])),
    "four images of four channels": (
        ([torch.full((4, n, 4), n) for n in range(1, 5)], rows(4)),
        second,
        ([torch.full((4, n, 4), n) for n in (2, 3)], rows(4)[1:3]),
    ),
    "four boxes in one of four images": (boxes(4), len, boxes(4)[1:3]),
}


def same(a: Any, b: Any) -> None:
    """Equality of nested batches, types included."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("kind", BATCHES)
def test_samples_of_a_batch(kind: str):
    batch, size, expected = BATCHES[kind]
    before = copy.deepcopy(batch)
    same(Counted(size).select(batch, 1, 3), expected)
    same(batch, before)


@pytest.mark.parametrize("collection", [list, tuple])
def test_two_samples_of_two_fields(collection: type):
    """As many fields as samples: what holds an entry for each sample is a field."""
    batch = collection([rows(2, 3), rows(2)])
    same(Counted(second).select(batch, 1, 2), collection([rows(2, 3)[1:], rows(2)[1:]]))
    batch = collection([pictures(2), boxes(2)])
    same(Counted(second).select(batch, 0, 1), collection([pictures(2)[:1], boxes(2)[:1]]))
    batch = collection([pictures(2), rows(2)])
    same(Counted(second).select(batch, 0, 1), collection([pictures(2)[:1], rows(2)[:1]]))


def test_a_batch_of_one_is_its_only_sample():
    for batch, size, _ in BATCHES.values():
        one = Counted(size).select(batch, 0, 1)
        same(Counted(size).select(one, 0, 1), one)


class Encoding(UserDict):
    """As the batches of `transformers`: a mapping with attributes and extras, made from a dictionary."""

    def __init__(self, data: dict[str, Any], encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings


@pytest.mark.parametrize("kind", [Encoding, OrderedDict, UserDict])
def test_mappings_keep_their_type(kind: type):
    batch = kind({"input_ids": rows(4, 5), "labels": rows(4)})
    part = Counted(lambda b: len(b["labels"])).select(batch, 1, 4)
    assert type(part) is kind
    assert torch.equal(part["input_ids"], rows(4, 5)[1:])
    assert torch.equal(part["labels"], rows(4)[1:])
    assert len(batch["labels"]) == 4


def test_a_mapping_with_a_constructor_of_its_own_is_an_error_that_says_what_to_do():
    class Batch(UserDict):
        def __init__(self, ids: Tensor, labels: Tensor) -> None:
            super().__init__({"ids": ids, "labels": labels})

    with pytest.raises(TaskError, match="select"):
        Counted(lambda b: len(b["labels"])).select(Batch(rows(4, 2), rows(4)), 0, 2)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"x": rows(4, 2), "n": 4}, lambda b: b["n"]),
        (torch.utils.data.TensorDataset(rows(4)), len),
        ((rows(2, 4), rows(4)), lambda b: b[0].shape[1]),
    ],
    ids=["a number", "another class", "samples along the second axis"],
)
def test_a_batch_that_cannot_be_divided_says_what_to_do(batch: Any, size: Callable[[Any], int]):
    with pytest.raises(TaskError, match=r"3 samples were cut from a batch of 4 and batch_size\(\) counts 4; .*select"):
        Counted(size).select(batch, 0, 3)


def test_a_batch_size_that_fails_on_a_part_says_what_to_do():
    def size(batch: Any) -> int:
        if len(batch) != 4:
            raise ValueError("4 expected")
        return 4

    with pytest.raises(TaskError, match=r"cannot be divided \(4 expected\); give Counted a select"):
        Counted(size).select(rows(4), 0, 2)


CALLS: dict[str, Callable[..., object]] = {
    "discover": tq.discover,
    "estimate_curvature": tq.estimate_curvature,
    "evaluate": tq.evaluate,
    "finetune": tq.finetune,
    "measure_sensitivity": lambda *arguments: tq.measure_sensitivity(*arguments, None),
    "quantize": lambda *arguments: tq.quantize(*arguments, None),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_arguments_in_another_order_are_one_clear_error(name: str) -> None:
    model, task = nn.Linear(4, 3), tq.ClassificationTask()
    batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(TaskError, match=r"\(model, batches, task\).*; got Linear, ClassificationTask, list"):
        CALLS[name](model, task, batches)
    with pytest.raises(TaskError, match=r"got Linear, list, NoneType"):
        CALLS[name](model, batches, None)


def test_a_model_of_doubles_and_a_batch_of_floats_are_one_clear_error() -> None:
    task, targets = tq.ClassificationTask(), torch.zeros(8, dtype=torch.long)
    for model, inputs in ((nn.Linear(4, 3).double(), torch.randn(8, 4)), (nn.Linear(4, 3), torch.randn(8, 4).double())):
        with pytest.raises(DataError, match=r"the model has torch\.float(32|64) parameters and the batch holds"):
            tq.estimate_curvature(model, [(inputs, targets)], task)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # the user's own, with its traceback
        tq.discover(nn.Linear(4, 3), [(torch.randn(8, 5), targets)], task)
