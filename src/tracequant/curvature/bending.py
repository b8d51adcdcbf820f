"""Which operations of a model bend: read off the graph of a forward pass, without any pass of its own.

A layer's Gauss-Newton block equals its Hessian block where the outputs are piecewise linear in that layer's weights:

    H_ii − G_ii = Σ_k (∂L/∂z_k) ∂²z_k / ∂W_i².

So every operation between the layer and the outputs must be piecewise linear in what depends on the layer. torch's
graph names each operation. Some always are (addition, ReLU, pooling, reshaping), some never are (GELU, softmax, layer
normalisation), and products are where at most one factor depends on the layer: a weight that meets its own output
again, as in a recurrent network, is one that bends. An operation of another name (a custom function) is unknown, and
the caller measures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Piecewise linear in all of their inputs together.
_LINEAR_NAMES = """
AccumulateGrad Abs AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Alias Amax Amin
Aminmax AsStrided AvgPool2D AvgPool3D Cat Ceil Chunk Clamp ClampMax ClampMin Clone Col2Im Conj Constant
ConstantPadNd Copy Cummax Cummin Cumsum Diag Diagonal DiagonalCopy Embedding Expand FftC2C FftC2R FftR2C Fill Flip
Floor Fmax Fmin FractionalMaxPool2DWithIndices Gather Hardshrink Hardsigmoid Hardtanh Im2Col Index IndexPut IndexAdd
IndexCopy IndexFill IndexSelect Kthvalue LeakyRelu LiftFresh MaskedFill MaskedScatter MaskedSelect Max
MaxPool2DWithIndices MaxPool3DWithIndices MaxUnpool2D MaxUnpool3D Maximum Mean NativeDropout Median Min Minimum
MkldnnMaxPool2D MkldnnReshape Movedim Nanmedian Neg Permute PixelShuffle PixelUnshuffle Positive Real
ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat RepeatInterleave ReplicationPad1D ReplicationPad2D
ReplicationPad3D ReshapeAlias Roll Rot90 Round RreluWithNoise Rsub Scatter ScatterAdd Select SelectScatter Sign
Slice SliceScatter Softshrink Sort Split SplitWithSizes Squeeze Stack Sub Sum T Take Threshold ToCopy Topk Trace
Transpose Tril Triu Trunc Unbind Unfold UnsafeSplit UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2D
UpsampleBilinear2DAa UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D
UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D View ViewAsComplex ViewAsReal Where
"""
_LINEAR = frozenset(_LINEAR_NAMES.split())
# Positions of the factors of a product; further inputs are added.
_PRODUCTS = {
    "Addbmm": (1, 2), "Addcmul": (1, 2), "Addmm": (1, 2), "Addmv": (1, 2), "Addr": (1, 2), "Baddbmm": (1, 2),
    "Bmm": (0, 1), "Convolution": (0, 1), "ConvolutionOverrideable": (0, 1), "CudnnConvolution": (0, 1), "Dot": (0, 1),
    "Ger": (0, 1), "GridSampler2D": (0, 1), "GridSampler3D": (0, 1), "Linear": (0, 1),
    "MkldnnConvolution": (0, 1), "MiopenConvolution": (0, 1), "Mm": (0, 1), "Mul": (0, 1), "Mv": (0, 1),
    "PreluKernel": (0, 1), "SlowConv3D": (0, 1), "SlowConvTranspose2D": (0, 1), "ThnnConv2D": (0, 1),
    "Trilinear": (0, 1, 2),
}  # fmt: skip
# Linear in the first input alone.
_FIRST_INPUT = {"Div", "GridSampler2D", "GridSampler3D", "PreluKernel"}
# Linear in evaluation mode, where the statistics are constants.
_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNormWithUpdate"}
# What bends, and what to call it.
_BENT = {
    "Acos": "acos", "Asin": "asin", "Atan": "atan", "Atan2": "atan2", "Cdist": "cdist",
    "Celu": "CELU", "Cos": "cos", "Cosh": "cosh", "Cumprod": "cumprod", "Elu": "ELU", "Erf": "erf", "Exp": "exp",
    "Exp2": "exp2", "Expm1": "expm1", "FusedRmsNorm": "RMSNorm", "Gelu": "GELU", "Glu": "GLU", "Hardswish": "Hardswish",
    "LinalgVectorNorm": "a norm", "Log": "log", "Log10": "log10", "Log1P": "log1p", "Log2": "log2",
    "LogSigmoid": "LogSigmoid", "LogSoftmax": "log_softmax", "Logaddexp": "logaddexp", "Logcumsumexp": "logcumsumexp",
    "Logsumexp": "logsumexp", "Mish": "Mish", "MkldnnRnnLayer": "a recurrent layer", "CudnnRnn": "a recurrent layer",
    "NativeGroupNorm": "GroupNorm", "NativeLayerNorm": "LayerNorm", "Norm": "a norm", "Prod": "prod",
    "Reciprocal": "a reciprocal", "Rsqrt": "rsqrt", "ScaledDotProductEfficientAttention": "attention",
    "ScaledDotProductFlashAttention": "attention", "ScaledDotProductFlashAttentionForCpu": "attention",
    "ScaledDotProductCudnnAttention": "attention", "ScaledDotProductFusedAttentionOverrideable": "attention",
    "Sigmoid": "sigmoid", "Silu": "SiLU", "Sin": "sin", "Sinh": "sinh", "SmoothL1Loss": "smooth L1",
    "Softmax": "softmax", "SafeSoftmax": "softmax", "MaskedSoftmax": "softmax",
    "Softplus": "Softplus", "Sqrt": "sqrt", "Std": "std", "StdMean": "std", "Tan": "tan", "Tanh": "tanh", "Var": "var",
    "VarMean": "var", "WeightNormInterface": "weight_norm", "WeightNorm": "weight_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Bends:
    """What stands between layers and outputs: operations that bend, and unknown ones, each with the sources behind it.

    A name maps to the names of the sources (layers or activations) in which the operation bends, or may.
    """

    bent: dict[str, set[str]]
    unknown: dict[str, set[str]]

    @property
    def exact(self) -> bool:
        """Whether nothing bends, and nothing is unknown."""
        return not self.bent and not self.unknown


def find_bends(outputs: Iterable[Tensor], sources: dict[str, list[Tensor]]) -> Bends:
    """What bends between the tensors `sources` (weights, activation variables by name) and `outputs`."""
    roots = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    masks: dict[Any, int] = {}
    origins: dict[Any, int] = {}
    names = list(sources)
    for number, tensors in enumerate(sources.values()):
        for tensor in tensors:
            if not tensor.is_leaf:
                origins[tensor.grad_fn] = origins.get(tensor.grad_fn, 0) | 1 << number
            elif (node := _accumulator(tensor)) is not None:
                origins[node] = origins.get(node, 0) | 1 << number
    bent: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for node in _inputs_first(roots):
        inputs = [0 if following is None else masks[following] for following, _ in node.next_functions]
        bends, name, known = _bending(node, inputs)
        if bends:
            target = bent if known else unknown
            target[name] = target.get(name, 0) | bends
        masks[node] = origins.get(node, 0)
        for mask in inputs:
            masks[node] |= mask

    def named(operations: dict[str, int]) -> dict[str, set[str]]:
        return {
            operation: {name for number, name in enumerate(names) if mask >> number & 1}
            for operation, mask in operations.items()
        }

    return Bends(named(bent), named(unknown))


def _bending(node: Any, inputs: list[int]) -> tuple[int, str, bool]:
    """The sources in which a node bends, what to call it, and whether that is known; one bit for each source."""
    everything = 0
    for mask in inputs:
        everything |= mask
    operation = _operation(node.name())
    if operation == "Abs" and node._saved_self.is_complex():
        return everything, "a modulus", True
    if operation in _LINEAR or not everything:
        return 0, "", True
    if operation in _NORMS:
        training = getattr(node, "_saved_training", None)
        bends = everything if training is None or training else _shared(inputs[:2])
        return bends, "BatchNorm by the statistics of the batch" if training else "BatchNorm", training is not None
    if operation == "Pow":
        exponent = getattr(node, "_saved_exponent", None)
        constant = not isinstance(exponent, Tensor) and exponent == 1
        return (0 if constant else everything), "a power", True
    if operation in _BENT:
        return everything, _BENT[operation], True
    bends = 0
    if operation in _FIRST_INPUT:
        for mask in inputs[1:]:
            bends |= mask
        if operation == "Div":
            return bends, "a quotient", True
    if operation in _PRODUCTS:
        factors = [inputs[i] for i in _PRODUCTS[operation] if i < len(inputs)]
        reads_weight = any(_is_leaf(node.next_functions[i][0]) for i in _PRODUCTS[operation] if i < len(inputs))
        return bends | _shared(factors), "a layer applied to its own output" if reads_weight else "a product", True
    if operation == "Lerp":
        return _shared([inputs[0] | inputs[1], *inputs[2:]]), "lerp", True
    return everything, node.name(), False


def _operation(name: str) -> str:
    """What a node of this name differentiates. Only torch's own end in a number: "ReluBackward" is a user's."""
    found = re.fullmatch(r"(\w+)Backward\d+", name)
    if found:
        return found[1]
    return {"torch::autograd::AccumulateGrad": "AccumulateGrad", "torch::autograd::CopyBackwards": "Copy"}.get(name, "")


def _is_leaf(node: Any) -> bool:
    """Whether a node is a parameter, or one in another shape."""
    while node is not None and _operation(node.name()) in ("T", "Transpose", "Permute", "View", "Unsqueeze", "Select"):
        node = node.next_functions[0][0]
    return node is not None and _operation(node.name()) == "AccumulateGrad"


def _shared(factors: list[int]) -> int:
    """Sources on which two factors depend."""
    seen = twice = 0
    for mask in factors:
        twice |= seen & mask
        seen |= mask
    return twice


def _inputs_first(roots: list[Any]) -> list[Any]:
    """All nodes of the graph, each behind those that it reads."""
    order: list[Any] = []
    seen: set[Any] = set()
    pending: list[tuple[Any, bool]] = [(root, False) for root in roots]
    while pending:
        node, ready = pending.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            pending.append((node, True))
            pending.extend((n, False) for n, _ in node.next_functions if n is not None and n not in seen)
    return order


def _accumulator(leaf: Tensor) -> Any:
    """The node where a leaf's gradient arrives."""
    return leaf.view_as(leaf).grad_fn.next_functions[0][0] if leaf.requires_grad else None  # type: ignore[union-attr]
