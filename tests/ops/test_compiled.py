"""ops/compiled.py: a module that was not built, cannot be loaded or is of another version is told apart in words."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

from sparsekern.ops import compiled

ROOT = Path(compiled.__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# what the subprocess runs on a package of nothing but compiled.py: an empty module stands for torch, which takes
# seconds to import, and with an argument one in sys.modules stands for a library that loads
ASK = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
if len(sys.argv) > 1:
    module = types.ModuleType("sparsekern._cpu")
    module.ABI = int(sys.argv[1])
    sys.modules["sparsekern._cpu"] = module
from sparsekern.ops import compiled
print(compiled.why_not("cpu") or compiled.cpu().ABI)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package that holds compiled.py and no compiled module."""
    ops = tmp_path / "sparsekern/ops"
    ops.mkdir(parents=True)
    (ops.parent / "__init__.py").touch()
    (ops / "__init__.py").touch()
    shutil.copy(compiled.__file__, ops)
    return ops.parent


def python(*args, cwd):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def why_not(package, *args):
    # -S: an editable install of sparsekern would find its own modules for the copy
    return python("-S", "-c", ASK, *args, cwd=package.parent)


def test_a_package_that_was_never_installed_is_not_built(package):
    said = why_not(package)
    assert said == "not built: the package was not installed, only found"


def test_the_compilers_reason_is_what_not_built_says(package):
    why = "the C++ compiler /bin/false does not work: it failed and said nothing"
    (package / "_build.json").write_text(json.dumps({"cpu": {"built": False, "why_not": why}}))
    assert why_not(package) == f"not built: {why}"


def test_a_module_whose_file_is_gone_is_not_built(package):
    (package / "_build.json").write_text(json.dumps({"cpu": {"built": True, "compiler": "g++ 12.2"}}))
    assert re.match("not built: it was, with g\\+\\+ 12.2, but its file is gone", why_not(package))


def test_a_file_that_is_no_library_cannot_be_loaded(package):
    (package / f"_cpu{SUFFIX}").write_bytes(b"not an ELF file, but long enough to have a header" * 4)
    assert re.match("cannot be loaded: .*(invalid ELF header|file too short)", why_not(package))


def test_a_module_for_another_python_is_built_for_another_version(package):
    (package / "_cpu.cpython-27-x86_64-linux-gnu.so").touch()
    said = why_not(package)
    assert said.startswith(
        "built for another version: found _cpu.cpython-27-x86_64-linux-gnu.so, this Python wants _cpu."
    )


def test_a_module_of_another_abi_is_built_for_another_version(package):
    said = why_not(package, compiled.ABI + 1)
    assert said.startswith(
        f"built for another version: its binding is {compiled.ABI + 1}, this package's is {compiled.ABI}"
    )


def test_a_module_of_this_abi_is_loaded(package):
    assert why_not(package, compiled.ABI) == str(compiled.ABI)


def test_the_abi_is_the_one_in_ops_h():
    source = (ROOT / "csrc/ops.h").read_text()
    assert int(re.search(r"constexpr int kAbi = (\d+);", source).group(1)) == compiled.ABI


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_what_is_not_loaded_has_a_reason(name):
    module, why = getattr(compiled, name)(), compiled.why_not(name)
    assert (module is None) == (why is not None)


def test_cpu_shares_torchs_openmp_runtime():
    """A second runtime would keep a second pool of threads that fights torch's for the cores."""
    if compiled.cpu() is None:
        pytest.skip(f"sparsekern._cpu: {compiled.why_not('cpu')}")
    code = "from sparsekern.ops import compiled; compiled.cpu(); print(open('/proc/self/maps').read())"
    libraries = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so[^/\s]*", python("-c", code, cwd=ROOT)))
    assert len(libraries) == 1
    assert "/torch/lib/" in libraries.pop()


OTHER_TORCH = """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = None
from sparsekern.formats import Bitmap
from sparsekern.ops import compiled, linear_bitmap
from sparsekern.ops.kernel import pick
print(compiled.why_not("cpu"))
print(pick(linear_bitmap.KERNELS, Bitmap.pack(torch.eye(3))).name)
"""


def test_a_torch_that_does_not_say_where_its_tensors_lie_is_told_when_the_module_is_loaded():
    """Not by the first forward pass of a layer that is packed already."""
    if compiled.cpu() is None:
        pytest.skip(f"sparsekern._cpu: {compiled.why_not('cpu')}")
    why, kernel = python("-c", OTHER_TORCH, cwd=ROOT).splitlines()
    assert why.startswith("cannot be loaded: this torch does not describe its tensors")
    assert why.endswith("need torch 2.11 or newer")
    assert kernel == "reference"


HIDDEN = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("sparsekern._cpu", "sparsekern._cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import torch
import sparsekern as sk
from sparsekern.ops import compiled
from transformers import LlamaConfig, LlamaForCausalLM

assert compiled.cpu() is None and compiled.cuda() is None
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
).eval()
tokens = torch.arange(24)[None]
sk.prune(model, sk.SparseGPT(), 0.5, [tokens])
dense = model(tokens).logits
report = sk.sparsify(model, plan=sk.Unmeasured())
assert {row["kernel"] for row in report.swapped} == {"reference"}, report.swapped
torch.testing.assert_close(model(tokens).logits, dense)
sk.densify(model)
assert torch.equal(model(tokens).logits, dense)
print("served by the reference ops:", len(report.swapped))
"""


def test_with_the_compiled_modules_hidden_everything_prunes_and_runs_by_the_reference_ops():
    assert python("-c", HIDDEN, cwd=ROOT) == "served by the reference ops: 7"


def test_a_launch_is_for_the_card_and_the_stream_of_its_tensors(monkeypatch):
    current, given = [0], {}

    class Device:
        def __init__(self, card):
            self.card = card

        def __enter__(self):
            current.append(self.card)

        def __exit__(self, *_):
            current.pop()

    def start(**arguments):
        given.update(arguments, card=current[-1])

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda card: 70 + card, raising=False)
    x = types.SimpleNamespace(data_ptr=lambda: 4096, numel=lambda: 12, get_device=lambda: 1)
    compiled.launch(start, x=x, bias=None, tokens=3)
    assert given == {"x": 4096, "x_size": 12, "bias": 0, "bias_size": 0, "tokens": 3, "stream": 71, "card": 1}
    assert current == [0]
