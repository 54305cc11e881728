"""onnx_models: y = x W^T as ONNX, in float32 and with 8-bit weights and activations."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def plain(weight, tokens):
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight.T.astype(np.float32)}, weight, tokens)


def quantised(weight, x):
    """One scale for all weights and one for all inputs, dequantised before the product: QDQ."""
    tensors = _integers(weight, x)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    return _model(nodes, tensors, weight, len(x))


def integer(weight, x):
    """The same integers, multiplied as such: what DeepSparse has a sparse kernel for."""
    tensors = _integers(weight, x)
    tensors["y_scale"] = np.float32(tensors["x_scale"] * tensors["w_scale"])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("MatMulInteger", ["xq", "w", "x_zero", "w_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["yq"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["yq", "y_scale"], ["y"]),
    ]
    return _model(nodes, {name: each for name, each in tensors.items() if name != "w_scale"}, weight, len(x))


def _integers(weight, x):
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    step = np.float32(np.abs(weight).max() / 127)
    return {
        "x_scale": scale,
        "x_zero": np.uint8(round(-low / float(scale))),
        "w_scale": step,
        "w_zero": np.int8(0),
        "w": np.round(weight.T / step).astype(np.int8),
    }


def _model(nodes, tensors, weight, tokens):
    out_features, in_features = weight.shape
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, out_features])],
        [numpy_helper.from_array(np.ascontiguousarray(tensor), name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 7
    onnx.checker.check_model(model)
    return model
