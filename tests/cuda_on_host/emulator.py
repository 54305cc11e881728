"""CUDA sources as a program of the CPU, under the address and undefined-behaviour sanitizers.

    program = build(folder, "linear_24.cpp", "linear_24.cu")
    y, = program.run("bf16", [x, values, None], [7, 37], [((7, 37), torch.bfloat16)], order="reverse")

linear_24.cpp, in this folder, reads its operands through operands.h and calls the launcher. The threads of a block take
turns in the order that is asked for; fibers.h and ptx_on_host.h say what is emulated and what they refuse.
"""

import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DSPARSEKERN_ON_HOST"]
# lines are counted for test_every_line.py
COVERAGE = "--coverage"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# a kernel that is right is right in each
ORDERS = ("forward", "reverse", "1")
# of every program that was made, with its lines' counts
FOLDERS: list[Path] = []


@dataclass(frozen=True)
class Program:
    """A program that `build` has made."""

    path: Path

    def run(
        self,
        op: str,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[int],
        results: Sequence[tuple[Sequence[int], torch.dtype]],
        order: str = "forward",
        multiprocessors: int = 4,
        shifts: dict[int, int] | None = None,
    ) -> list[Tensor]:
        """The results of one call, each of the given shape and dtype; what nobody wrote to is all ones, which is NaN.

        order   forward, reverse, or a number that seeds a shuffle: in which the threads and blocks take their turns
        shifts  of tensor number i, by how many bytes it misses 16

        Raises AssertionError with the program's words when a sanitizer or the emulator stops it.
        """
        done = self.call(op, tensors, numbers, order, multiprocessors, shifts)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-6000:]
        found, at = [], 0
        for shape, dtype in results:
            size = torch.Size(shape).numel() * dtype.itemsize
            data = bytearray(done.stdout[at : at + size])
            found.append((torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(*shape))
            at += size
        assert at == len(done.stdout), f"results of {at} bytes were expected, {len(done.stdout)} came"
        return found

    def call(
        self,
        op: str,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[int],
        order: str = "forward",
        multiprocessors: int = 4,
        shifts: dict[int, int] | None = None,
    ) -> subprocess.CompletedProcess:
        """The program's exit status, standard output and standard error, whatever they are.

        order  may be "counted" too: nothing is run, and standard error has a line a launch
        """
        sent = b""
        for i, tensor in enumerate(tensors):
            data = b"" if tensor is None else _bytes(tensor)
            sent += struct.pack("=qq", -1 if tensor is None else len(data), (shifts or {}).get(i, 0)) + data
        return subprocess.run(
            [self.path, order, str(multiprocessors), op, *map(str, numbers)],
            input=sent,
            capture_output=True,
            env={"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
        )


@dataclass(frozen=True)
class Launch:
    """How a kernel was started."""

    blocks: int
    threads: int
    shared_bytes: int


def launches(done: subprocess.CompletedProcess) -> list[Launch]:
    """Those of a call that was counted."""
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    lines = [tuple(map(int, line.split())) for line in done.stderr.decode().splitlines()]
    return [Launch(x * y, threads, shared_bytes) for x, y, threads, shared_bytes in lines]


def build(folder: Path, *sources: str | Path) -> Program:
    """The program made of a driver of this folder and of CUDA sources of csrc/cuda, by name. Skips without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ was found")
    include = ["-I", HERE, "-I", CSRC / "cuda"]
    paths = [next(p for p in (HERE / source, CSRC / "cuda" / source) if p.exists()) for source in sources]

    def compile_one(path: Path, sanitizers: list[str]) -> subprocess.CompletedProcess:
        target = folder / f"{path.name}.o"
        command = [compiler, *FLAGS, COVERAGE, *sanitizers, *include, "-x", "c++", "-c", path, "-o", target]
        return subprocess.run(command, capture_output=True, text=True)

    # a g++ without the sanitizers' libraries still compares the numbers
    for sanitizers in (SANITIZERS, []):
        with ThreadPoolExecutor() as pool:
            for done in pool.map(compile_one, paths, [sanitizers] * len(paths)):
                assert done.returncode == 0, done.stderr[-6000:]
        program = folder / Path(sources[0]).stem
        objects = [folder / f"{path.name}.o" for path in paths]
        done = subprocess.run(
            [compiler, COVERAGE, *sanitizers, *objects, "-o", program], capture_output=True, text=True
        )
        if done.returncode == 0:
            FOLDERS.append(folder)
            return Program(program)
    raise AssertionError(done.stderr)


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach().contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
