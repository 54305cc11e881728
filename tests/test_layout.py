"""The rules that keep the tree from rotting, read from the sources: who may import whom, and what has a test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparsekern"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(set((PACKAGE / "ops").glob("*.py")) - {PACKAGE / f"ops/{name}.py" for name in ("__init__", "kernel")})
METHODS = sorted(set((PACKAGE / "methods").glob("*.py")) - {PACKAGE / "methods/__init__.py"})
FORMATS = sorted(set((PACKAGE / "formats").glob("*.py")) - {PACKAGE / "formats/__init__.py"})

# part -> the parts it may import; a part is a module of the package or a folder with all that is in it
ARROWS = {
    "pattern": {"ops"},
    "stats": {"ops"},
    "formats": {"grid"},
    "timing": set(),
    "baselines": {"ops"},
    "documents": set(),
    "text": {"documents"},
    "shapes": set(),
    "measure": {"timing"},
    "ops": {"formats"},
    "grid": set(),
    "methods": {"pattern", "stats", "ops", "grid"},
    "experts": set(),
    "publish": set(),
    "residence": set(),
    "journal": set(),
    "model_files": {"shards"},
    "hf_weights": set(),
    "paging": {"hf", "hf_weights", "model_files", "shards"},
    "hf_files": {"publish"},
    "hf_generate": {"shapes"},
    "hf": {"experts", "hf_files"},
    "batches": set(),
    "finishing": {"hf", "experts"},
    "traces": {"hf", "experts", "batches"},
    "calibrate": {"hf", "experts", "batches", "finishing", "residence", "traces"},
    "gradients": {"hf", "experts", "batches", "stats"},
    "report": {"finishing"},
    "oneshot": {*("pattern", "stats", "methods", "calibrate", "finishing", "gradients", "hf"), "report", "residence"},
    "streaming": {*("oneshot", "paging", "journal", "publish", "residence", "report", "traces", "batches", "finishing")}
    | {*("hf", "hf_weights", "measure", "model_files", "shards", "methods", "ops", "pattern", "stats")},
    "channel_order": {"pattern"},
    "channel_sites": {"hf"},
    "permute": {"channel_order", "channel_sites", "calibrate", "hf", "pattern", "stats"},
    "allocation": {"oneshot", "methods", "calibrate", "gradients", "batches", "hf", "pattern", "stats"},
    "fixed_masks": set(),
    "gradual": {"pattern", "fixed_masks", "hf", "experts"},
    "hf_trainer": {"pattern", "fixed_masks", "gradual", "linear"},
    "lottery_journal": {"publish"},
    "training": {"fixed_masks", "lottery_journal"},
    "lottery": {"pattern", "methods", "fixed_masks", "lottery_journal", "training"},
    "decisions": {"timing"},
    "plan_cache": {"decisions", "measure", "ops", "timing"},
    "plan": {"baselines", "decisions", "formats", "measure", "ops", "plan_cache", "timing"},
    "lazy_weight": set(),
    "linear": {"formats", "lazy_weight", "ops"},
    "swap": {"decisions", "formats", "linear", "ops", "plan"},
    "shards": set(),
    "packed_layer": {"formats", "ops", "shards"},
    "manifest": {"formats", "packed_layer", "shards"},
    "packing": {"formats", "ops", "packed_layer", "shards"},
    "state": {"linear"},
    "compressed_tensors": {"formats", "shards"},
    "sources": {"compressed_tensors", "manifest", "model_files", "packed_layer", "shards"},
    "convert": {"formats", "hf", "manifest", "model_files", "packed_layer", "packing", "publish", "shards", "sources"},
    "checkpoint": {"convert", "manifest", "packing", "packed_layer", "shards", "state", "linear", "swap", "plan"}
    | {"formats", "publish", "hf"},
    "hf_quantizer": {"formats", "ops", "linear", "manifest", "packed_layer", "shards", "swap", "checkpoint"},
}
# the two halves meet in an ordinary nn.Linear whose weight holds zeros, and nowhere else
PRUNE = {"batches", "calibrate", "experts", "gradients", "methods", "oneshot", "lottery", "permute", "allocation"} | {
    *("fixed_masks", "gradual", "lottery_journal", "training", "streaming", "paging", "traces")
}
RUN = {"formats", "linear", "plan", "swap"}
# commands and what they are made of: they may import everything, and of the rest only each other imports them
DOORS = {"card", "cli", "commands", "demo", "doctor", "inspect", "preview", "tickets"}
DOORS |= {"endtoend", "generation", "speed", "variants"}
# foreign thing -> where it is let in: what the path in the package begins with
FOREIGN = {"transformers": ("hf.py", "hf_"), "triton": ("ops/triton/",), "sklearn": ("tickets/digits.py",)}


def name(path):
    return str(path.relative_to(ROOT))


def part(path):
    """ "ops" for sparsekern/ops/kernel.py, "hf" for sparsekern/hf.py, "" for sparsekern/__init__.py."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem.replace("__init__", "")


def imports(path):
    """Every module that a file imports, at its top or inside a function, as (dotted name, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: a relative import; write it from sparsekern"
            # `from sparsekern import hf` imports sparsekern.hf
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def test_contributing_says_where_every_module_is():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    modules = {path.stem for path in [*PACKAGE.glob("*.py"), *METHODS, *OPS]} - {"__init__", "__main__", "compiled"}
    assert {module for module in modules if f"`{module}`" not in table} == set()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_follow_the_arrows(path):
    own = part(path)
    if own in {"", "__main__"} | DOORS:
        return
    assert own in ARROWS, f"{own} has no place in ARROWS: say there what it may import"
    for module, line in imports(path):
        root, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if root == "sparsekern" and target != own:
            assert target in ARROWS[own], f"{name(path)}:{line}: {own} must not import {target}"


def test_the_two_halves_do_not_know_each_other():
    for half, other in ((PRUNE, RUN), (RUN, PRUNE)):
        for own in half & ARROWS.keys():
            assert not ARROWS[own] & other


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_foreign_thing_has_its_doors(path):
    inside = str(path.relative_to(PACKAGE))
    for module, line in imports(path):
        doors = FOREIGN.get(module.partition(".")[0])
        allowed = doors is None or inside.startswith(doors)
        assert allowed, f"{name(path)}:{line}: {module} is imported in {' and '.join(doors)} only"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_package_reads_no_environment_catches_nothing_blindly_and_imports_no_star(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{name(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            environment = (
                isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in ("environ", "getenv")
            )
            assert not environment, f"{where}: a choice is an argument, never an environment variable"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("Exception", "BaseException", "everything"), f"{where}: catches {caught}"
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            assert "*" not in names, f"{where}: star import"
            assert node.module != "os" or not names & {"environ", "getenv"}, f"{where}: reads the environment"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_module_is_named_after_nothing(path):
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


def test_every_folder_of_sources_is_a_package():
    folders = {path.parent for path in SOURCES}
    assert [name(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", [*OPS, *METHODS, *FORMATS], ids=name)
def test_every_op_method_and_format_has_its_test(path):
    test = ROOT / "tests" / path.parent.name / f"test_{path.name}"
    assert test.exists(), f"{name(test)} is missing"


@pytest.mark.parametrize(
    "path", [p for p in OPS if p.stem not in ("compiled", "cusparselt", "linear_call", "wgmma_24")], ids=name
)
def test_every_op_has_a_reference(path):
    functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert "reference" in functions


def test_every_triton_kernel_is_named_after_its_op():
    kernels = {path.stem for path in (PACKAGE / "ops/triton").glob("[!_]*.py")}
    assert kernels <= {op.stem for op in OPS}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]), ids=name)
def test_every_compiled_source_is_named_after_its_op(path):
    """linear_bitmap_avx512.cpp belongs to linear_bitmap: one translation unit an instruction set."""
    assert any(path.stem == op.stem or path.stem.startswith(f"{op.stem}_") for op in OPS)


@pytest.mark.parametrize("path", sorted(p for p in ROOT.glob("csrc/**/*") if p.is_file()), ids=name)
def test_csrc_includes_no_torch_and_pybind11_only_to_bind(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    assert not [header for header in included if re.match(r"(torch|ATen|c10)/", header)]
    binds = path.parent.name == "csrc" and path.name.startswith("bind_")
    assert binds or not [header for header in included if header.startswith("pybind11")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("bench/[!_]*.py")), ids=name)
def test_every_bench_file_runs_at_a_tiny_size_in_some_test(path):
    """A script that no test runs rots: some test must name it."""
    names = (f"bench.{path.stem}", f"bench/{path.name}", f"bench import {path.stem}", f'"{path.name}"')
    tests = [test.read_text() for test in ROOT.glob("tests/**/test_*.py") if test != Path(__file__)]
    assert any(named in test for test in tests for named in names), f"no test runs {name(path)}"


@pytest.mark.parametrize(
    "path",
    sorted(p for folder in ("sparsekern", "csrc", "bench", "tests") for p in (ROOT / folder).rglob("*.*")
           if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")),
    ids=name,
)  # fmt: skip
def test_a_long_file_says_at_its_top_why_it_is_not_split(path):
    lines = path.read_text().splitlines()
    limit = 600 if path.suffix in (".cu", ".cuh") else 400
    why = "one file because" in "\n".join(lines[:40]).lower()
    assert len(lines) <= limit or why, (
        f"{name(path)} has {len(lines)} lines, more than {limit}: split it by concept, or say at its top "
        '"one file because ..."'
    )
