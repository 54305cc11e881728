"""Builds sparsekern._cpu (where a C++ compiler is) and sparsekern._cuda (where nvcc is) through a written build.ninja;
and sparsekern._wgmma where CUTLASS is too: one more kernel for Hopper, which takes minutes and is needed nowhere.

All are plain pybind11 modules: no torch is needed to build them and none is linked. What was built, with what, or why
not, is written to sparsekern/_build.json, which sparsekern/ops/compiled.py reads.

SPARSEKERN_BUILD    auto     build what can be built, warn and go on without the rest (the default)
                    require  a module whose compiler is there must build; there must be a C++ compiler
                    none     build nothing: the reference ops serve
CXX CXXFLAGS LDFLAGS         the C++ compiler (default: the first of g++, clang++, c++) and what is added to its flags
CUDA_HOME                    the only place to look for nvcc (default: PATH, then /usr/local/cuda)
SPARSEKERN_CUDA_ARCHS        the cards to build for, as nvcc names them: "90a" or "80 90a" (default: all below). PTX for
                             newer cards comes with them where 80 is among them
CUTLASS_HOME                 a folder with CUTLASS's include/ (default: the installed package nvidia-cutlass)
"""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# an older one stops at the licence's name in pyproject.toml, and says so in two screens
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"sparsekern is built by setuptools 77 or newer, got {setuptools.__version__}: "
        f"{sys.executable} -m pip install 'setuptools>=77'"
    )

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# object files: kept, so that a second build compiles what changed
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# the cards we are measured on; each nvcc builds those it knows, the PTX serves every other card from Ampere on
CUDA_ARCHS = ("80", "86", "89", "90a", "120")
CUDA_PTX = "80"
WGMMA_ARCH = "90a"
NINJA = """\
cflags = {cflags}
ldflags = {ldflags}

rule compile
  command = {compiler} -MMD -MF $out.d $cflags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in

rule link
  command = {compiler} -shared $in -o $out $ldflags
  description = $out
"""


class CannotBuildError(Exception):
    """Why a module is not built, in one line; `log` is the compiler's whole output."""

    def __init__(self, why: str, log: str = "", missing: bool = False):
        super().__init__(why)
        self.log = log
        self.missing = missing  # no compiler, rather than one that fails


def run(command: list[str]) -> tuple[int, str]:
    """The exit status and the output of a command; 127 and the reason when it cannot be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    return done.returncode, done.stdout


def first_error(log: str) -> str:
    """The line of a compiler's output that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\b(fatal|error)\b|not found|undefined reference|cannot find", line, re.IGNORECASE):
            return line.replace(f"{ROOT}/", "")
    return lines[0] if lines else "it failed and said nothing"


def cxx() -> list[str]:
    """The C++ compiler's command, tried on an empty program."""
    named = os.environ.get("CXX")
    found = named or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if found is None:
        raise CannotBuildError("no C++ compiler was found: looked for g++, clang++, c++ and CXX", missing=True)
    command = shlex.split(found)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() { return 0; }\n")
        status, log = run([*command, "-std=c++17", str(source), "-o", str(Path(folder, "empty"))])
    if status:
        raise CannotBuildError(f"the C++ compiler {found} does not work: {first_error(log)}", log)
    return command


def has_gnu_openmp(compiler: list[str]) -> bool:
    """Whether -fopenmp gives GNU's runtime, which is torch's: a second runtime would fight it for the cores."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "openmp.cpp"), Path(folder, "openmp.so")
        source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        status, _ = run([*compiler, "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)])
        return status == 0 and b"libgomp.so" in library.read_bytes()


def nvcc() -> str:
    """The CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        where = f"CUDA_HOME={home}" if home else "PATH and /usr/local/cuda"
        raise CannotBuildError(f"nvcc was not found in {where}", missing=True)
    return found


def cuda_targets(compiler: str) -> list[str]:
    """One -gencode for each card that is asked for and this nvcc knows, and one for the PTX."""
    asked = re.findall(r"[^\s,;]+", os.environ.get("SPARSEKERN_CUDA_ARCHS", "")) or CUDA_ARCHS
    if unknown := [arch for arch in asked if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
        raise CannotBuildError(f'SPARSEKERN_CUDA_ARCHS must be like "90a" or "80 90a", got {unknown[0]!r}')
    known = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.write_text("")
        for arch in asked:
            gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
            if run([compiler, "--dryrun", gencode, "-c", str(source), "-o", str(Path(folder, "empty.o"))])[0] == 0:
                known.append(gencode)
    if not known:
        raise CannotBuildError(f"{compiler} knows none of sm_{', sm_'.join(asked)}")
    ptx = [f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}"] if CUDA_PTX in asked else []
    return [*known, *ptx]


def headers(build: Path) -> list[str]:
    """-isystem for Python's and pybind11's headers; the latter are copied to `build`.

    An isolated build finds pybind11 in a folder of a new name each time, which would compile everything anew.
    """
    try:
        pybind11 = importlib.import_module("pybind11")
    except ModuleNotFoundError as error:
        raise CannotBuildError(f"pybind11 is not installed in {sys.executable}", missing=True) from error
    copy = build / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        partial = copy.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(copy)
    return ["-isystem", sysconfig.get_path("include"), "-isystem", str(copy)]


def ninja_quote(path: Path) -> str:
    """A path as build.ninja writes it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_build(name: str, build: Path, rules: dict[str, str], sources: list[Path]) -> Path:
    """Write `build`/build.ninja, run it, and return the module's file."""
    build.mkdir(parents=True, exist_ok=True)
    module = build / f"_{name}{SUFFIX}"
    lines, objects = [NINJA.format(**rules)], []
    for source in sources:
        objects.append(build / f"{source.name}.o")
        lines.append(f"build {ninja_quote(objects[-1])}: compile {ninja_quote(source)}")
    lines.append(f"build {ninja_quote(module)}: link {' '.join(map(ninja_quote, objects))}")
    (build / "build.ninja").write_text("\n".join([*lines, ""]))
    ninja = shutil.which("ninja")
    status, log = run([*([ninja] if ninja else [sys.executable, "-m", "ninja"]), "-C", str(build)])
    if status:
        raise CannotBuildError(first_error(log), log)
    return module


def build_cpu(build: Path) -> tuple[Path, dict]:
    """Compile csrc/cpu; instruction sets beyond the baseline are chosen by pragmas in the files themselves."""
    compiler = cxx()
    openmp = has_gnu_openmp(compiler)
    flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *["-fopenmp"][: int(openmp)]]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    rules = {
        "compiler": shlex.join(compiler),
        "cflags": shlex.join([*flags, *headers(build.parent)]),
        "ldflags": shlex.join([*["-fopenmp"][: int(openmp)], *shlex.split(os.environ.get("LDFLAGS", ""))]),
    }
    elsewhere = ("bind_cuda", "bind_wgmma")
    bindings = [path for path in sorted(CSRC.glob("bind_*.cpp")) if not path.name.startswith(elsewhere)]
    sources = [*sorted(CSRC.glob("cpu/*.cpp")), *bindings]
    module = ninja_build("cpu", build, rules, sources)
    version = run([*compiler, "--version"])[1].splitlines()[0]
    return module, {"compiler": version, "flags": flags, "openmp": openmp}


def build_cuda(build: Path) -> tuple[Path, dict]:
    """Compile csrc/cuda; the runtime is linked in, so that the module imports where there is no driver."""
    compiler = nvcc()
    flags = ["-O3", "-std=c++17", *cuda_targets(compiler), "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    rules = {
        "compiler": shlex.join([compiler, "-ccbin", [word for word in cxx() if not word.startswith("-")][-1]]),
        "cflags": shlex.join([*flags, *headers(build.parent)]),
        "ldflags": "-cudart=static -Xlinker=--exclude-libs,ALL",
    }
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CSRC.glob("bind_cuda*.cpp"))]
    module = ninja_build("cuda", build, rules, sources)
    version = run([compiler, "--version"])[1].splitlines()
    return module, {"compiler": "nvcc " + next((x for x in version if "release" in x), ""), "flags": flags}


def cutlass() -> Path:
    """CUTLASS's headers."""
    home = os.environ.get("CUTLASS_HOME")
    if home:
        where, found = f"CUTLASS_HOME={home}", Path(home, "include")
    else:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or spec.origin is None:
            raise CannotBuildError("CUTLASS is not installed: pip install nvidia-cutlass", missing=True)
        where, found = "the package cutlass_library", Path(spec.origin).parent / "source/include"
    if not (found / "cutlass/cutlass.h").exists():
        raise CannotBuildError(f"{where} has no include/cutlass/cutlass.h", missing=True)
    return found


def build_wgmma(build: Path) -> tuple[Path, dict]:
    """Compile csrc/wgmma for Hopper alone: a minute and 4 GB for each tile."""
    found, compiler = cutlass(), nvcc()
    if f"-gencode=arch=compute_{WGMMA_ARCH},code=sm_{WGMMA_ARCH}" not in cuda_targets(compiler):
        raise CannotBuildError(f"{compiler} does not know sm_{WGMMA_ARCH}", missing=True)
    flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{WGMMA_ARCH},code=sm_{WGMMA_ARCH}"]
    # an assert of CUTLASS is a call in the main loop, which makes the compiler wait for each wgmma
    flags += ["-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    rules = {
        "compiler": shlex.join([compiler, "-ccbin", [word for word in cxx() if not word.startswith("-")][-1]]),
        "cflags": shlex.join([*flags, "-isystem", str(found), *headers(build.parent)]),
        "ldflags": "-cudart=static -Xlinker=--exclude-libs,ALL",
    }
    sources = [*sorted(CSRC.glob("wgmma/*.cu")), CSRC / "bind_wgmma.cpp"]
    module = ninja_build("wgmma", build, rules, sources)
    version = run([compiler, "--version"])[1].splitlines()
    return module, {"compiler": "nvcc " + next((x for x in version if "release" in x), ""), "flags": flags}


class BuildModules(build_ext):
    """Each module on its own: one that fails does not take the other with it."""

    def run(self) -> None:
        """Build, put the modules and _build.json where setuptools wants them, warn once of what is missing."""
        choice = os.environ.get("SPARSEKERN_BUILD", "auto")
        if choice not in ("auto", "require", "none"):
            raise CompileError(f"SPARSEKERN_BUILD must be auto, require or none, got {choice!r}")
        package = (ROOT if self.inplace else Path(self.build_lib)) / "sparsekern"
        package.mkdir(parents=True, exist_ok=True)
        record, missing = {}, []
        for name, build_module in (("cpu", build_cpu), ("cuda", build_cuda), ("wgmma", build_wgmma)):
            target = package / f"_{name}{SUFFIX}"
            if choice == "none":
                target.unlink(missing_ok=True)
                record[name] = {"built": False, "why_not": "SPARSEKERN_BUILD=none"}
                continue
            try:
                built, how = build_module(BUILD / name)
            except CannotBuildError as error:
                # a module of an earlier build must not outlive a failed one
                target.unlink(missing_ok=True)
                sys.stderr.write(error.log)
                if choice == "require" and not (name != "cpu" and error.missing):
                    raise CompileError(
                        f"SPARSEKERN_BUILD=require, but sparsekern._{name} is not built: {error}"
                    ) from error
                record[name] = {"built": False, "why_not": str(error)}
                if not error.missing or name == "cpu":
                    missing.append(f"  sparsekern._{name} is not built: {error}")
                continue
            # a process that has the old file open keeps it
            partial = target.with_suffix(".partial")
            shutil.copy2(built, partial)
            partial.replace(target)
            record[name] = {"built": True, **how}
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
        if missing:
            sys.stderr.write("\n".join(["warning: the reference ops serve in place of compiled ones", *missing, ""]))

    def get_outputs(self) -> list[str]:
        """The files that a wheel carries."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing: an editable install builds in place."""
        return {}


setup(ext_modules=[Extension("sparsekern._cpu", [])], cmdclass={"build_ext": BuildModules})
