"""A run in a child process that may take only so much memory, and checkpoints that are larger."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig

from sparsekern import hf, model_files


def under_limit(run: Callable[[], object], data_bytes: int) -> tuple[str | None, int]:
    """What a forked child says of its end, None for a good one, and the most memory that it held, in bytes.

    data_bytes  of private memory that it may take, this process's own included: heap, stacks and private maps
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # the child must not go on with the tests, whatever happens
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
            try:
                run()
                said = None
            except (MemoryError, RuntimeError, ValueError, OSError) as error:
                said = " ".join(str(error).split()) or type(error).__name__
            peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(write, json.dumps([said, 1024 * peak_kb]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return tuple(json.loads(text)) if text else ("it was killed", 0)


def data_bytes() -> int:
    """The private memory of this process, as RLIMIT_DATA counts it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmData"].split()[0])


def random_checkpoint(directory: Path, **sizes: int) -> int:
    """A Llama in float32 with random weights, a shard a block, never in memory as a whole; returns its bytes."""
    directory.mkdir()
    config = LlamaConfig(**sizes, tie_word_embeddings=False, dtype="float32", architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    model, generator = hf.skeleton(directory), torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    places: dict[str, str] = {}
    for number, block in enumerate(["", *(name for name, _ in hf.blocks(model))]):
        names = [name for name in shapes if (name.startswith(f"{block}.") if block else ".layers." not in name)]
        file = f"model-{number}.safetensors"
        # norms begin at one
        model_files.write(
            directory / file,
            {
                name: torch.randn(shapes[name], generator=generator) * 0.02
                if len(shapes[name]) > 1
                else torch.ones(shapes[name])
                for name in names
            },
        )
        places |= dict.fromkeys(names, file)
    (directory / model_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
