"""OpenVINO: bfloat16 dense, int8 weights and activations, and those with its option for sparse weights.

CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE is taken on processors with AMX; elsewhere the plugin runs the weights dense and
says nothing.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as op

NAMES = ("OpenVINO bf16", "OpenVINO int8", "OpenVINO int8 sparse")


def build(name, weight, x, threads, copies):
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if name == "OpenVINO bf16":
        settings["INFERENCE_PRECISION_HINT"] = "bf16"
    elif name == "OpenVINO int8 sparse":
        settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = "0.3"
    core, requests = ov.Core(), []
    for _ in range(copies):
        model = _model(weight, x) if name == "OpenVINO bf16" else _quantised(weight, x)
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(ov.Tensor(np.ascontiguousarray(x), shared_memory=True))
        requests.append(request)

    def run(number):
        requests[number % copies].infer()
        return requests[number % copies]

    return run, lambda request: request.get_output_tensor().data.astype(np.float32)


def _model(weight, x):
    given = op.parameter(list(x.shape), ov.Type.f32)
    return ov.Model([op.matmul(given, op.constant(weight), False, True)], [given])


def _quantised(weight, x):
    given = op.parameter(list(x.shape), ov.Type.f32)
    largest = np.float32(np.abs(x).max())
    low, high = np.float32(-largest * 128 / 127), largest
    rounded = op.fake_quantize(given, low, high, low, high, 256)
    step = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / 127
    step[step == 0] = 1
    integers = op.convert(op.constant(np.round(weight / step).astype(np.int8)), "f32")
    return ov.Model([op.matmul(rounded, op.multiply(integers, op.constant(step)), False, True)], [given])
