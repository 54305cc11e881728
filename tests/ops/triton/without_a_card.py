"""Triton kernels where there may be no card: cases run in the interpreter, and what the compiler makes of a kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def assert_cases_hold(file, interpret):
    """Run a file of tests in its own process: TRITON_INTERPRET must be set before triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).with_name(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def compiled_for(arch, kernel, constants, types, options, folder):
    """The registers, the bytes spilled, and the instructions of a kernel, read from the cubin of sm_`arch`.

    types    those of the arguments that are no constants
    options  of the launch: num_warps, num_stages, maxnreg
    """
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    # as at a launch: addresses, sizes and strides are multiples of 16
    whole = [i for i, name in enumerate(names) if name not in constants and types[name] != "fp32"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in whole})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"])

    def read(tool, *flags):
        return subprocess.run([tool.path, *flags, cubin], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", read(knobs.nvidia.cuobjdump, "-res-usage"))
    registers, stack, local = map(int, usage.groups())
    sass = read(knobs.nvidia.nvdisasm, "-c")
    return registers, stack + local, re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", sass)
