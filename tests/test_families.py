"""Network families of torchvision, timm and transformers, from analysis to a packed file that is loaded again.

The smallest variants on tiny inputs, with random weights. What cannot be quantized is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracequant as tq
from tracequant.model.batches import Batch

torchvision = pytest.importorskip("torchvision", reason="the families are torchvision's, timm's and transformers'")

CLASSES = 5
Make = Callable[[], nn.Module]


def vision(name: str, **options: Any) -> Make:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def timm(name: str, **options: Any) -> Make:
    def make() -> nn.Module:
        library = pytest.importorskip("timm", reason="the family is timm's")
        return library.create_model(name, num_classes=CLASSES, **options)

    return make


def resnet(block: str, **options: Any) -> nn.Module:
    kind = getattr(torchvision.models.resnet, block)
    return torchvision.models.ResNet(kind, [1, 1, 1, 1], num_classes=CLASSES, **options)


def timm_resnext() -> nn.Module:
    models = pytest.importorskip("timm", reason="the family is timm's").models.resnet
    return models.ResNet(
        models.Bottleneck, (1, 1, 1, 1), num_classes=CLASSES, cardinality=4, base_width=16, channels=(8, 8, 16, 16)
    )


def convnext() -> nn.Module:
    blocks = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([blocks(16, 32, 1), blocks(32, None, 1)], num_classes=CLASSES)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 32, num_classes=CLASSES)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [2, 2], num_classes=CLASSES)


FAST: dict[str, Make] = {
    "torchvision densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=CLASSES),
    "torchvision mobilenet_v2": vision(
        "mobilenet_v2", width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [6, 32, 2, 2]]
    ),
    "torchvision convnext": convnext,
    "torchvision vit": vit,
    "torchvision swin": swin,
    "timm resnet": timm("test_resnet"),
    "timm resnext": timm_resnext,
    "timm densenet": timm("densenet121", growth_rate=8, block_config=(2, 2)),
    "timm mobilenetv2": timm("mobilenetv2_035"),
    "timm mobilenetv3": timm("mobilenetv3_small_050"),
    "timm efficientnet": timm("test_efficientnet"),
    "timm convnext": timm("test_convnext"),
    "timm vit": timm("test_vit", img_size=32),
    "timm swin": timm(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
    ),
}
SLOW: dict[str, Make] = {
    "torchvision resnet": lambda: resnet("BasicBlock"),
    "torchvision resnext": lambda: resnet("Bottleneck", groups=8, width_per_group=4),
    "torchvision mobilenet_v3": vision("mobilenet_v3_small", width_mult=0.5),
    "torchvision efficientnet": vision("efficientnet_b0"),
    "torchvision regnet": vision("regnet_y_400mf"),
    "timm regnet": timm("regnety_002"),
}


def prepared(make: Make, batches: list[Batch], task: tq.Task) -> nn.Module:
    """The network as training would have left it: BatchNorm has seen inputs, and nothing hides behind zeros."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
        for parameter in module.parameters(recurse=False):
            if parameter.abs().max() < 1e-3:
                nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        for batch in batches:
            task.outputs(model.train(), batch)
    return model.eval()


def check_whole_flow(make: Make, batches: list[Batch], task: tq.Task, folder: Path) -> tq.BitPlan:
    """Analyze, plan, quantize, train one step, pack, load; the plan."""
    model = prepared(make, batches, task)
    curvature = tq.estimate_curvature(model, batches, task, num_probes=2, estimator="gauss_newton")
    assert all(estimate.trace > 0 for estimate in curvature.weights.values())
    sensitivity = tq.measure_sensitivity(model, batches, task, curvature, weight_bits=(2, 4, 8), activation_bits=(4, 8))
    plan = tq.solve(sensitivity, average_bits=4, average_activation_bits=7.5)
    quantized = tq.quantize(model, batches, task, plan)
    before = {name: tensor.clone() for name, tensor in quantized.named_parameters()}
    losses = tq.finetune(quantized, batches, task, steps=1, learning_rate=1e-3, teacher=model).losses
    assert len(losses) == 1
    moved = [name for name, tensor in quantized.named_parameters() if not torch.equal(tensor, before[name])]
    assert len(moved) > len(before) / 2
    quantized.eval()
    assert tq.pack(quantized, folder / "model.safetensors") == plan.size_bytes
    torch.manual_seed(1)
    again = tq.load(folder / "model.safetensors", make()).eval()
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(task.outputs(again, batch), task.outputs(quantized, batch))
    return plan


def layers_of(model: nn.Module) -> int:
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    return sum(isinstance(module, kinds) for module in model.modules())


def check_vision(make: Make, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    targets = torch.arange(8) % CLASSES
    batches = [(images[:4], targets[:4]), (images[4:], targets[4:])]
    plan = check_whole_flow(make, batches, tq.ClassificationTask(), folder)
    assert len(plan.weight_bits) >= layers_of(make())


@pytest.mark.filterwarnings("ignore:.*not significantly above zero")
@pytest.mark.parametrize("family", FAST)
def test_vision_networks(family: str, tmp_path: Path) -> None:
    check_vision(FAST[family], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_larger_vision_networks(family: str, tmp_path: Path) -> None:
    check_vision(SLOW[family], tmp_path)


def tokens(words: int) -> Tensor:
    return torch.randint(0, words, (8, 8), generator=torch.Generator().manual_seed(0))


def test_bert(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="BERT is transformers'")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=CLASSES, initializer_range=0.3,
    )  # fmt: skip
    ids, mask = tokens(50), torch.ones(8, 8, dtype=torch.long)
    batches = [
        ({"input_ids": ids[part], "attention_mask": mask[part]}, torch.arange(4) % CLASSES)
        for part in (slice(4), slice(4, 8))
    ]
    plan = check_whole_flow(
        lambda: transformers.BertForSequenceClassification(config), batches, tq.ClassificationTask(), tmp_path
    )
    assert {"bert.embeddings.word_embeddings", "bert.encoder.layer.1.attention.self.query"} <= set(plan.weight_bits)


# The next token at every position, classes in the second axis.
NEXT_TOKEN = tq.ClassificationTask(
    forward=lambda model, ids: model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)
)


def next_tokens(words: int) -> list[Batch]:
    ids = tokens(words)
    return [(ids[:4], ids[:4, 1:]), (ids[4:], ids[4:, 1:])]


def test_a_causal_language_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the network is transformers'")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    plan = check_whole_flow(lambda: transformers.LlamaForCausalLM(config), next_tokens(40), NEXT_TOKEN, tmp_path)
    assert len(plan.weight_bits) == 2 * 7 + 2


def test_linear_layers_of_another_make(tmp_path: Path) -> None:
    """GPT-2, whose linear layers are transformers' Conv1D, with an output layer tied to the embedding."""
    transformers = pytest.importorskip("transformers", reason="the network is transformers'")
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    plan = check_whole_flow(lambda: transformers.GPT2LMHeadModel(config), next_tokens(40), NEXT_TOKEN, tmp_path)
    assert len(plan.weight_bits) == 4 + 2
