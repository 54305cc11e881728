"""What the compiler made of a CUDA module: registers, memory, instructions and loops, read by cuobjdump."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;/]*)")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: "HMMA.SP.16832.F32"
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.opcode.startswith("BRA") else None
        return int(found.group(1), 16) if found else None


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. local: bytes of memory a thread for what no register held, stack included."""

    name: str
    registers: int
    local: int
    instructions: tuple[Instruction, ...]

    def count(self, opcode: str) -> int:
        return sum(each.opcode.startswith(opcode) for each in self.instructions)

    def before_refusals(self) -> tuple[Instruction, ...]:
        """What stands before the last way out but one: behind it a kernel tells of what it refuses."""
        ways_out = [i for i, each in enumerate(self.instructions) if each.opcode.startswith("EXIT")]
        return self.instructions[: ways_out[-2] + 1]

    def loop_with(self, opcode: str) -> "Compiled":
        """The shortest loop with an instruction; a loop inside it counts once. Raises LookupError without any."""
        loops = []
        for last in self.instructions:
            # a branch to itself stands at the end of every kernel
            if last.target is not None and last.target < last.address:
                body = tuple(each for each in self.instructions if last.target <= each.address <= last.address)
                if any(each.opcode.startswith(opcode) for each in body):
                    loops.append(body)
        if not loops:
            raise LookupError(f"{self.name} has no loop with {opcode}")
        return Compiled(self.name, self.registers, self.local, min(loops, key=len))


def cuobjdump() -> Path | None:
    """The toolkit's, or the one in Triton's package; None without either."""
    if found := shutil.which("cuobjdump", path=None) or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return Path(found)
    triton = find_spec("triton")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return tool if tool and tool.exists() else None


def _read(tool: Path, *arguments: object) -> str:
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def architectures(tool: Path, module: Path) -> tuple[set[str], set[str]]:
    """Those with machine code that has kernels, and those with PTX."""
    # not from its list of files: cuobjdump 12.8 leaves the a of sm_90a out of their names
    found = re.findall(
        r"^Fatbin (elf|ptx) code:\n=+\narch = (sm_\w+)$", _read(tool, "-res-usage", module), re.MULTILINE
    )
    return tuple({arch for kind, arch in found if kind == wanted} for wanted in ("elf", "ptx"))


def usage(tool: Path, module: Path, arch: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of local memory, stack included, of a thread of each kernel, by its mangled name."""
    found = USAGE.findall(_read(tool, "-res-usage", "-arch", arch, module))
    return {name: (int(registers), int(stack) + int(local)) for name, registers, stack, local in found}


def kernels(tool: Path, module: Path, arch: str) -> dict[str, Compiled]:
    """The kernels of a module for one architecture, by their mangled name."""
    used, found = usage(tool, module, arch), {}
    for part in _read(tool, "-sass", "-arch", arch, module).split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        instructions = tuple(Instruction(int(at, 16), opcode, rest) for at, opcode, rest in INSTRUCTION.findall(code))
        found[name.strip()] = Compiled(name.strip(), *used[name.strip()], instructions)
    return found
