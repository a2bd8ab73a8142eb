"""Rewrites a traced graph into the patterns from which runtimes make integer convolutions.

As traced, an int8 weight is ``Cast(int8) * scale``, which a runtime folds into a float constant on loading.
It makes an integer convolution only if input and weight both come from DequantizeLinear, the weight's being
of a constant.
"""

from __future__ import annotations

from typing import Any, Dict, List

LARGEST_INT32 = 2**31 - 1


def integer_convolutions(model: Any, target: str) -> None:
    """Rewrite an onnx.ModelProto in place for one of aether_quant.TARGETS.

    Convolutions with a quantised input get integer weights. TensorRT accepts no computed weights next to
    quantisers, so its other weights become float constants.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    values = _constants(graph)
    made_by = {output: node for node in graph.node for output in node.output}
    nodes: List[Any] = []

    def add(name: str, value: Any) -> str:
        values[name] = value
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def dequantize(codes: str, scale: Any, zero: Any, output: str) -> str:
        """Add a DequantizeLinear with a scale for each output channel."""
        inputs = [codes, add(f"{output}_scale", scale), add(f"{output}_zero_point", zero)]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [output], axis=0))
        return output

    for node in graph.node:
        known = node.op_type in ("Cast", "Mul") and all(name in values for name in node.input)
        if known and (target == "tensorrt" or values[node.input[0]].ndim == 0):
            if node.op_type == "Mul":
                product = values[node.input[0]] * values[node.input[1]].astype(np.float32)
            else:
                dtype = helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
                product = values[node.input[0]].astype(dtype)
            add(node.output[0], np.asarray(product))
            continue
        nodes.append(node)
        source = made_by.get(node.input[0]) if node.op_type == "Conv" else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        weight = made_by.get(node.input[1])
        if weight is not None and weight.op_type == "Mul":
            nodes.pop()
            codes, scale = made_by[weight.input[0]].input[0], values[weight.input[1]].reshape(-1)
            name = node.input[1]
            node.input[1] = dequantize(codes, scale, np.zeros(scale.shape, np.int8), f"{name}_float")
            if target != "tensorrt":
                step = scale * values[source.input[1]]
                bias = np.clip(np.rint(values[node.input[2]] / step), -LARGEST_INT32, LARGEST_INT32)
                codes = add(f"{name}_bias", bias.astype(np.int32))
                zero = np.zeros(scale.shape, np.int32)
                node.input[2] = dequantize(codes, step, zero, f"{name}_bias_float")
            nodes.append(node)
    _replace(graph, nodes)


def _constants(graph: Any) -> Dict[str, Any]:
    """Name -> array of every constant. Names that the tracer gave to the same tensor are merged."""
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    same = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in values
    }
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
    return values


def _replace(graph: Any, nodes: List[Any]) -> None:
    """Give the graph these nodes, without unused nodes and constants."""
    used = {output.name for output in graph.output}
    kept: List[Any] = []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, initializers)):
        del field[:]
        field.extend(values)
