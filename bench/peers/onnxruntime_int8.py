"""onnxruntime: float32, and 8-bit weights and activations, both dense: it has no sparse product."""

import onnx_models
import onnxruntime

NAMES = ("onnxruntime float32", "onnxruntime int8")


def build(name, weight, x, threads, copies):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # threads that spin after a call take the processor from whoever runs next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = onnx_models.quantised(weight, x) if name == "onnxruntime int8" else onnx_models.plain(weight, len(x))
    data = model.SerializeToString()
    sessions = [onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]) for _ in range(copies)]
    return lambda number: sessions[number % copies].run(None, {"x": x})[0], lambda y: y
