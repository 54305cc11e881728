"""sparsekern doctor: what was built and what serves here."""

from rich.table import Table

from sparsekern import doctor
from sparsekern.commands.arguments import AsJson
from sparsekern.commands.output import print_result

EXAMPLE = "`sparsekern doctor`"


def command(as_json: AsJson = False):
    """What was built, which kernels this machine can use, and why the others refuse."""

    def tables(facts):
        about = Table("what", "", title="machine")
        for name, value in {**facts["machine"], **facts["libraries"]}.items():
            about.add_row(name, "–" if value is None else ", ".join(value) if isinstance(value, list) else str(value))
        modules = Table("module", "", title="compiled")
        for name, reason in facts["modules"].items():
            modules.add_row(f"sparsekern._{name}", reason or "loaded")
        if facts["instruction_set"]:
            others = [name for name in facts["instruction_sets"] if name != facts["instruction_set"]]
            modules.add_row("CPU kernels", f"{facts['instruction_set']}, could be told to use {', '.join(others)}")
        kernels = Table("device", "format", "dtype", "kernel", "", title="kernels of a linear layer, best first")
        for row in facts["kernels"]:
            verdict = "used" if row["used"] else row["refusal"] or "serves, not needed"
            kernels.add_row(row["device"], row["format"], row["dtype"], row["kernel"], verdict)
        return [about, modules, kernels]

    print_result(doctor.examine(), as_json, tables)
