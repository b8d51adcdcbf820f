"""Passes over an ONNX graph: codes of k bits in place of float weights, BatchNorm folded into their scales.

How codes of k bits are stored, so that a runtime unpacks them once, when it loads the file (constant folding), and then
computes with int8. ONNX has 8-bit and 4-bit integers; other widths are cut into planes of 4, 2 and 1 bits, low bits
first. A plane of 4 bits is a UINT4 tensor; of one with fewer, each UINT4 element holds the bits of 2 or 4 codes and is
looked up in a table of 16 rows, which also shifts them to their place. The sum of the planes is the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from tracequant.deploy.onnx_codes import COMPUTE, CodeWriter, StoredWeight, code_bytes, constant

# What only chooses or moves values, which may as well be rounded before it.
_MOVES = ("MaxPool", "Concat", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


def rewrite(model: ir.Model, weights: Mapping[str, StoredWeight], weights_only: bool) -> int:
    """Replace the initializers that `weights` names by their codes, in place, and clean the graph up.

    Returns the bytes of all codes in the graph; weights that the model does not use are not in it.
    """
    _fold(model, weights)
    writer = CodeWriter(model, weights_only)
    written = {}
    for name, weight in weights.items():
        if name in model.graph.initializers:
            writer.replace(model.graph.initializers[name], weight)
            written[weight.entry.name] = weight
    for node in model.graph:
        if node.op_type == "Add" and not weights_only:
            _widen_bias(node)
    for node in reversed(list(model.graph)):
        if node.op_type in _MOVES:
            _round_before(model.graph, node)
    for node in list(model.graph):
        if node.op_type in ("Relu", "Clip"):
            _clip_codes(model.graph, node)
    _tidy(model)
    return sum(code_bytes(weight) for weight in written.values())


def _fold(model: ir.Model, weights: Mapping[str, StoredWeight]) -> None:
    """Fold constants, the weights aside: as inputs of the graph they are not seen as constants."""
    graph = model.graph
    hidden = [graph.initializers.pop(name) for name in weights if name in graph.initializers]
    count = len(graph.inputs)
    graph.inputs.extend(hidden)
    fold_constants(model)
    del graph.inputs[count:]
    for simplify in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        simplify(model)
    for value in hidden:
        graph.register_initializer(value)


def _widen_bias(node: ir.Node) -> None:
    """Give the bias of a MatMul of 3 or more dimensions as many: ONNX Runtime would make a slower Gemm of the two."""
    for index in (0, 1):
        bias, product = node.inputs[index], node.inputs[1 - index]
        if bias is None or product is None or bias.const_value is None or bias.const_value.shape.rank() != 1:
            continue
        producer, shape = product.producer(), product.shape
        if producer is not None and producer.op_type == "MatMul" and shape is not None and len(shape) >= 3:
            if len(bias.uses()) == 1:
                wide = bias.const_value.numpy().reshape([1] * (len(shape) - 1) + [-1])
                bias.const_value = ir.tensor(wide)
                bias.shape = ir.Shape(wide.shape)
            return


def _round_before(graph: ir.Graph, node: ir.Node) -> None:
    """Round the inputs of a pooling or concatenation as its output is: the same values, and convolutions fuse.

    Rounding is monotone, so the maximum of rounded values is the rounded maximum, and rounding that once more changes
    nothing. Only where nobody reads the output unrounded.
    """
    readers = node.outputs[0].consumers()
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
        return
    chain = [readers[0]]
    while chain[-1].op_type != "DequantizeLinear":
        chain.append(chain[-1].outputs[0].consumers()[0])
    for index, value in enumerate(node.inputs if node.op_type == "Concat" else node.inputs[:1]):
        # What is rounded already (or never computed by a convolution) stays.
        producer = None if value is None else value.producer()
        if value is None or producer is None or producer.op_type == "DequantizeLinear":
            continue
        for link in chain:
            copied = ir.node(link.op_type, [value, *link.inputs[1:]], dict(link.attributes))
            graph.insert_before(node, copied)
            value = copied.outputs[0]
        node.replace_input_with(index, value)


def _clip_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Leave out a ReLU or clamp that rounding makes idle, or let it limit the codes: an integer kernel has no float.

    Behind a grid that lies within its limits it changes nothing. Before rounding it is the same as rounding first and
    limiting the codes to those of its limits, since rounding keeps order.
    """
    limits = _limits(node)
    source, readers = node.inputs[0], node.outputs[0].consumers()
    if limits is None or source is None or node.outputs[0].is_graph_output():
        return
    producer = source.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        grid = _grid(producer)
        values = None if grid is None else [(code - grid.zero) * grid.scale for code in grid.codes]
        if values is not None and limits[0] <= values[0] and values[1] <= limits[1]:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            graph.remove(node, safe=True)
        return
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return
    (rounding,) = readers
    (following,) = rounding.outputs[0].consumers() if len(rounding.outputs[0].consumers()) == 1 else (None,)
    if following is None:
        return
    last = following.outputs[0].consumers()[0] if following.op_type == "Clip" else following
    if last.op_type != "DequantizeLinear":
        return
    grid = _grid(last)
    if grid is None:
        return
    rounding.replace_input_with(0, source)
    graph.remove(node, safe=True)
    codes = [float(np.clip(np.round(np.float32(x) / np.float32(grid.scale)) + grid.zero, *grid.codes)) for x in limits]
    if tuple(codes) != grid.codes:
        ends = [constant(graph, f"code.{int(code)}", np.array(code, np.uint8)) for code in codes]
        clip = ir.node("Clip", [rounding.outputs[0], *ends])
        graph.insert_before(last, clip)
        last.replace_input_with(0, clip.outputs[0])


def _limits(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or Clip limits floats to; None where that is computed, or the node clips integers."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    if producer is not None and producer.op_type in ("QuantizeLinear", "Clip"):
        return None
    ends = []
    for value, default in zip((*node.inputs[1:], None, None), (-np.inf, np.inf), strict=False):
        if value is not None and value.const_value is None:
            return None
        ends.append(default if value is None or value.const_value is None else float(value.const_value.numpy()))
    return ends[0], ends[1]


class _Grid(NamedTuple):
    """What an activation is rounded to: scale, the code of zero, the lowest and the highest code."""

    scale: float
    zero: float
    codes: tuple[float, float]


def _grid(dequantize: ir.Node) -> _Grid | None:
    """The grid of a rounding by its last node, None where the node dequantizes something else."""
    given = [None if value is None else value.const_value for value in dequantize.inputs[1:]]
    if len(given) != 2 or given[0] is None or given[1] is None or given[1].dtype != ir.DataType.UINT8:
        return None
    codes = dequantize.inputs[0]
    producer = None if codes is None else codes.producer()
    low, high = 0.0, 255.0
    if producer is not None and producer.op_type == "Clip":
        ends = [value.const_value for value in producer.inputs[1:] if value is not None]
        if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
            low, high = float(ends[0].numpy()), float(ends[1].numpy())
    return _Grid(float(given[0].numpy()), float(given[1].numpy()), (low, high))


def _tidy(model: ir.Model) -> None:
    """Drop what a runtime does not need: unused parts, types of intermediate values, long names."""
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    graph = model.graph
    named = {id(value) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    count = 0
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _drop_defaults(node)
        if node.op_type not in COMPUTE:
            node.name = ""
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in named:
                value.name, value.type, value.shape = f"{count:x}", None, None
                count += 1
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _drop_defaults(node: ir.Node) -> None:
    """Leave out what a quantizer of one scale does not need to say: in a small network it adds up."""
    for name, default in (("output_dtype", 0), ("block_size", 0), ("saturate", 1)):
        if name in node.attributes and node.attributes[name].as_int() == default:
            del node.attributes[name]
    scale = node.inputs[1]
    if "axis" in node.attributes and scale is not None and scale.shape is not None and not len(scale.shape):
        del node.attributes["axis"]
