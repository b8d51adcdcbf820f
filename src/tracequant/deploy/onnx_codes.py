"""Weights of k bits in an ONNX graph: codes in place of float weights, BatchNorm folded into their scales."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tracequant.core.packed_layout import PackedWeight

# Widths of the planes of a code, low bits first.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight: codes `[*shape]` 0 ... 2^k - 1; scale and zero point, one or one per channel, flat."""

    entry: PackedWeight
    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.float32]


def code_bytes(weight: StoredWeight) -> int:
    """Bytes of a weight's codes in an ONNX file."""
    if weight.entry.num_bits == 8:
        return weight.codes.size
    elements = (ceil(weight.codes.size * width / 4) for width in PLANES[weight.entry.num_bits])
    return sum(ceil(count / 2) for count in elements)


class CodeWriter:
    """Puts codes in place of weights; what several weights share (tables, shapes) is written once."""

    def __init__(self, model: ir.Model, weights_only: bool) -> None:
        self.graph = model.graph
        self.weights_only = weights_only
        self._unpacked: dict[tuple[int, bool], ir.Value] = {}
        self._calls: dict[str, int] = {}

    def replace(self, old: ir.Value, weight: StoredWeight) -> None:
        """Let every consumer of `old` read the dequantized codes."""
        assert old.name is not None
        name, layer = old.name, weight.entry.name
        del self.graph.initializers[name]
        for node, index in list(old.uses()):
            transposed = node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
            scale, axis = weight.scale, weight.entry.axis
            if node.op_type in COMPUTE and index == 1:
                self._name(node, layer)
                scale, axis = self._fold_batch_norm(node, weight)
            if transposed:
                for consumer in node.outputs[0].consumers():
                    self._name(consumer, layer)
                axis = None if axis is None else 1 - axis
            value = self._dequantized(name, weight, scale, axis, transposed, node)
            if transposed:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                self.graph.remove(node, safe=True)
            else:
                node.replace_input_with(index, value)

    def _name(self, node: ir.Node, layer: str) -> None:
        """Call a node after its layer; a runtime wants names to differ where a layer is called several times."""
        count = self._calls.get(layer, 0)
        self._calls[layer] = count + 1
        node.name = f"{layer}:{count}" if count else layer

    def _dequantized(
        self,
        name: str,
        weight: StoredWeight,
        scale: NDArray[np.float32],
        axis: int | None,
        transposed: bool,
        before: ir.Node,
    ) -> ir.Value:
        """The weight in float, computed from its codes just before a node."""
        codes, offset = self._codes(name, weight, transposed, before)
        factor, zero_point = 1.0, None
        if not weight.entry.symmetric:
            zero_point = (weight.zero_point - offset).astype(codes.dtype.numpy() if codes.dtype else np.int8)
        elif weight.entry.num_bits <= 2:
            factor = 0.5  # 2c - (2^k - 1) counts in half steps
        if len(scale) == 1:
            scale, axis = scale.reshape(()), None
            zero_point = None if zero_point is None else zero_point.reshape(())
        elif zero_point is not None and len(zero_point) == 1:
            zero_point = np.repeat(zero_point, len(scale))
        inputs = [codes, self._constant(f"{name}.scale", (scale * np.float32(factor)).astype(np.float32))]
        if zero_point is not None:
            inputs.append(self._constant(f"{name}.zero_point", zero_point))
        return self._insert(before, "DequantizeLinear", inputs, {} if axis is None else {"axis": axis})

    def _codes(self, name: str, weight: StoredWeight, transposed: bool, before: ir.Node) -> tuple[ir.Value, float]:
        """The codes as integers that the runtime computes with, and what was taken off them."""
        bits, symmetric = weight.entry.num_bits, weight.entry.symmetric
        offset = 2.0 ** (bits - 1) if symmetric else 0.0
        key = (id(weight), transposed)
        if key not in self._unpacked:
            if bits == 8:
                stored = weight.codes.astype(np.int16) - int(offset)
                codes = self._constant(name, stored.astype(np.int8 if symmetric else np.uint8))
            elif bits == 4 and self.weights_only:
                # Kernels for packed weights want them as they are stored, with nothing in between.
                stored = weight.codes.astype(np.int16) - int(offset)
                kind = ir.DataType.INT4 if symmetric else ir.DataType.UINT4
                codes = self._nibbles(name, stored.T if transposed else stored, kind)
            elif bits == 4 and symmetric:
                stored = weight.codes.astype(np.int16) - int(offset)
                codes = self._nibbles(name, stored, ir.DataType.INT4)
                codes = self._insert(before, "Cast", [codes], {"to": ir.DataType.INT8})
            else:
                codes = self._sum_of_planes(name, weight, before)
            if transposed and not (bits == 4 and self.weights_only):
                codes = self._insert(before, "Transpose", [codes], {"perm": [1, 0]})
            self._unpacked[key] = codes
        return self._unpacked[key], offset

    def _sum_of_planes(self, name: str, weight: StoredWeight, before: ir.Node) -> ir.Value:
        """Codes from their planes, an int8 tensor of the weight's shape."""
        bits = weight.entry.num_bits
        offset = (2**bits - 1 if bits <= 2 else 2 ** (bits - 1)) if weight.entry.symmetric else 0
        step = 2 if weight.entry.symmetric and bits <= 2 else 1
        shift, total = 0, None
        for number, width in enumerate(PLANES[bits]):
            last = number == len(PLANES[bits]) - 1
            plane = self._plane(
                name if number == 0 else f"{name}.{number}",
                weight.codes >> shift & (1 << width) - 1,
                width,
                step << shift,
                offset if last else 0,
                before,
            )
            total = plane if total is None else self._insert(before, "Add", [total, plane], {})
            shift += width
        assert total is not None
        return total

    def _plane(self, name: str, bits: NDArray[Any], width: int, step: int, offset: int, before: ir.Node) -> ir.Value:
        """Values step * bits - offset as int8, from `width` bits of every code."""
        if width == 4 and step == 1 and offset == 0:
            nibbles = self._nibbles(name, bits, ir.DataType.UINT4)
            return self._insert(before, "Cast", [nibbles], {"to": ir.DataType.INT8})
        count = 4 // width
        flat = np.pad(bits.reshape(-1), (0, -bits.size % count)).reshape(-1, count)
        shifts = width * np.arange(count)
        nibbles = self._nibbles(name, (flat << shifts).sum(1), ir.DataType.UINT4)
        entries = np.arange(16)[:, None] >> shifts & (1 << width) - 1
        table = self._constant(f"unpack.{width}.{step}.{offset}", (step * entries - offset).astype(np.int8))
        index = self._insert(before, "Cast", [nibbles], {"to": ir.DataType.INT32})
        values = self._insert(before, "Gather", [table, index], {})
        if bits.size % count:
            ends = [np.array([number], np.int64) for number in (-1, 0, bits.size)]
            line, start, end = (self._constant(f"unpack.at.{int(number[0])}", number) for number in ends)
            values = self._insert(before, "Reshape", [values, line], {})
            values = self._insert(before, "Slice", [values, start, end], {})
        shape = self._constant("unpack.to." + "x".join(map(str, bits.shape)), np.array(bits.shape, np.int64))
        return self._insert(before, "Reshape", [values, shape], {})

    def _nibbles(self, name: str, values: NDArray[Any], kind: ir.DataType) -> ir.Value:
        """An initializer of 4-bit integers, two to a byte."""
        return self._constant(name, values.astype(kind.numpy()))

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return constant(self.graph, name, array)

    def _insert(self, before: ir.Node, kind: str, inputs: list[ir.Value], attributes: dict[str, Any]) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        if kind != "DequantizeLinear" and (dtype := attributes.get("to", inputs[0].dtype)) is not None:
            node.outputs[0].dtype = dtype  # the type of a zero point follows that of its codes
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _fold_batch_norm(self, node: ir.Node, weight: StoredWeight) -> tuple[NDArray[np.float32], int | None]:
        """Scales, with a BatchNorm that alone reads the node's output folded into them, and their axis.

        Codes stay as they are: a channel's factor goes into its scale, the shift into the bias.
        """
        unchanged = weight.scale, weight.entry.axis
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or readers[0].op_type != "BatchNormalization" or node.outputs[0].is_graph_output():
            return unchanged
        axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}.get(node.op_type)
        grouped = node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) != 1
        if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0):
            return unchanged
        norm = readers[0]
        given = [value.const_value if value is not None else None for value in norm.inputs[1:5]]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if axis is None or grouped or None in given or (bias is not None and bias.const_value is None):
            return unchanged
        if weight.entry.axis not in (None, axis):
            return unchanged
        gamma, beta, mean, variance = (tensor.numpy().astype(np.float64) for tensor in given if tensor is not None)
        factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
        old = bias.const_value.numpy() if bias is not None and bias.const_value is not None else np.float64(0)
        shifted = (beta + (old - mean) * factor).astype(np.float32)
        prefix = weight.entry.name.removesuffix("weight")
        name = f"{prefix}.bias" if prefix and not prefix.endswith(".") else f"{prefix}bias"
        new_bias = self._own_bias(name, bias, shifted)
        node.resize_inputs(3)
        node.replace_input_with(2, new_bias)
        ir.convenience.replace_all_uses_with(norm.outputs[0], node.outputs[0], replace_graph_outputs=True)
        self.graph.remove(norm, safe=True)
        return (weight.scale * factor).astype(np.float32), axis

    def _own_bias(self, name: str, old: ir.Value | None, values: NDArray[np.float32]) -> ir.Value:
        """The folded bias, under the layer's own name once the old one has no other reader."""
        if old is not None and old.name == name and len(old.uses()) == 1:
            old.const_value = ir.tensor(values)
            return old
        return self._constant(name, values)


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """The initializer of this name and content, under a longer name where the name has another content."""
    tensor = ir.tensor(array)
    while (present := graph.initializers.get(name)) is not None:
        held = present.const_value
        if held is not None and held.dtype == tensor.dtype and np.array_equal(held.numpy(), tensor.numpy()):
            return present
        name += "'"
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
