"""Small models that the tests share, each with the trait that its name says; data for them; a snapshot of a model."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracequant import Task

CLASSES = 5


class ConvNet(nn.Module):
    """Two conv-BN-ReLU stages, the second grouped and strided, then a linear layer: images [N, 3, H, W] to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the input, which a 1x1 convolution adapts where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class ResidualNet(nn.Module):
    """A stem, a block whose input two convolutions read, and a block whose input also takes the identity path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block1 = ResidualBlock(4, 6, stride=2)
        self.block2 = ResidualBlock(6, 6, stride=1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(images))))
        return self.fc(x.mean((2, 3)))


class SharedHeadNet(nn.Module):
    """Two convolutions read the images at two resolutions; one head is applied to both results."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, padding=1)
        self.coarse = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        levels = [torch.tanh(self.fine(images)), torch.tanh(self.coarse(images))]
        return torch.stack([self.head(level).mean((2, 3)) for level in levels]).sum(0)


class TiedNet(nn.Module):
    """A language model in miniature: tokens [N, T] to logits [N, 7, T], output weights tied to the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(tokens)))).transpose(1, 2)


class AttentionNet(nn.Module):
    """Self-attention over a sequence [N, T, 3], by the fused kernel where torch has one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, sequence: Tensor) -> Tensor:
        x = torch.tanh(self.embed(sequence))
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


class UNet(nn.Module):
    """Two levels down, two up with concatenated paths: images [N, 3, H, W] to logits [N, classes, H, W]."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.down1 = self._stage(3, width)
        self.down2 = self._stage(width, 2 * width)
        self.bottom = self._stage(2 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, 2, stride=2)
        self.join2 = self._stage(4 * width, width)
        self.up1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.join1 = self._stage(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.down1(images)
        coarse = self.down2(F.max_pool2d(fine, 2))
        bottom = self.bottom(F.max_pool2d(coarse, 2))
        middle = self.join2(torch.cat([self.up2(bottom), coarse], 1))
        return self.head(self.join1(torch.cat([self.up1(middle), fine], 1)))

    @staticmethod
    def _stage(width_in: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class LSTMClassifier(nn.Module):
    """Words [N, T] to logits [N, CLASSES] by an embedding, an LSTM and a linear layer on its last state."""

    def __init__(self, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embedding(words))[0][:, -1])


def build(kind: type[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with weights of this seed and BatchNorm statistics and parameters drawn at random, in training mode."""
    torch.manual_seed(seed)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.3)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    return model.to(dtype)


def conv_net() -> nn.Module:
    """`ConvNet` in float64."""
    return build(ConvNet)


def residual_net() -> nn.Module:
    """`ResidualNet` in float64."""
    return build(ResidualNet)


def shared_head_net() -> nn.Module:
    """`SharedHeadNet` in float64."""
    return build(SharedHeadNet)


def tied_net() -> nn.Module:
    """`TiedNet` in float64."""
    return build(TiedNet)


def attention_net() -> nn.Module:
    """`AttentionNet` in float64."""
    return build(AttentionNet)


def gelu_mlp() -> nn.Module:
    """Vectors [N, 6] to logits through one hidden layer of 8, in float64."""
    return build(lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, CLASSES)))


def labelled(*shape: int, sizes: tuple[int, ...] = (4,), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches `(inputs, targets)` of these sizes: inputs [size, *shape] in float64, targets of `CLASSES` classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def images(sizes: tuple[int, ...] = (4,)) -> list[tuple[Tensor, Tensor]]:
    """Batches of labelled images of 3 x 8 x 8."""
    return labelled(3, 8, 8, sizes=sizes)


def token_batch() -> tuple[Tensor, Tensor]:
    """Tokens and next tokens, 3 sequences of 5 out of a vocabulary of 7."""
    tokens = torch.randint(0, 7, (3, 6), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


class EnergyTask(Task):
    """A batch is the tuple of the model's arguments; the loss is Σ c·out² over all outputs, divided by the samples."""

    def __init__(self, coefficients: Tensor | float = 1.0) -> None:
        self.coefficients = coefficients

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        return model(*batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        return sum((self.coefficients * t.square()).sum() for t in tensors if t is not None) / self.batch_size(batch)

    def metric(self, outputs: Any, batch: Any) -> float:
        return 0.0

    def batch_size(self, batch: Any) -> int:
        return len(batch[0])


def exact_hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The Hessian [n, n] of a scalar function by `torch.func`, forward over reverse, unlike the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own first use of forward mode warns of torch.jit
        return torch.func.hessian(function)(at).reshape(at.numel(), at.numel())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that an analysis must give back as it was, as values that compare with ==; the CPU's RNG state included."""

    def data(tensor: Tensor) -> bytes:
        return tensor.detach().cpu().numpy().tobytes()

    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "parameters": {
            name: (id(p), p.requires_grad, data(p), None if p.grad is None else (id(p.grad), data(p.grad)))
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        "buffers": {name: (id(b), data(b)) for name, b in model.named_buffers()},
        "rng": data(torch.get_rng_state()),
    }
