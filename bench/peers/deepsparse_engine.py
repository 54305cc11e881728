"""DeepSparse 1.8, which is no longer developed: float32, and 8-bit weights and activations, both sparse."""

import os
import tempfile

import deepsparse
import onnx
import onnx_models

NAMES = ("DeepSparse float32", "DeepSparse int8")


def build(name, weight, x, threads, copies):
    model = onnx_models.integer(weight, x) if name == "DeepSparse int8" else onnx_models.plain(weight, len(x))
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "linear.onnx")
        onnx.save(model, path)
        # the number of inputs of a batch is the first dimension
        engines = [deepsparse.compile_model(path, batch_size=len(x), num_cores=threads) for _ in range(copies)]
    return lambda number: engines[number % copies].run([x])[0], lambda y: y
