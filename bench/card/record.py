"""record: the rows of a run, kept in a JSON file as they come, so that a run that is cut off keeps what it had."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

Json = dict[str, object]

# importing torch on a cold disk takes half of it; a card that hangs takes longer
ANSWER_SECONDS = 90.0
MACHINE = """
import json, torch
from sparsekern.measure import machine
facts = machine()
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    facts["multiprocessors"], facts["memory_bytes"] = card.multi_processor_count, card.total_memory
    facts["l2_bytes"], facts["capability"] = card.L2_cache_size, [card.major, card.minor]
print(json.dumps(facts))
"""


@dataclass
class Record:
    """What a run found.

    where  the card, the driver, the versions, the commit and the date: of every row
    rows   one dict a measurement or a check; "stage" says of which stage; "error" and "left_out" say why there is none
    """

    path: Path
    where: Json
    tiny: bool
    rows: list[Json] = field(default_factory=list)
    seconds: float | None = None

    def add(self, row: Json) -> None:
        """Keep a row, on the disk too."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Put everything on the disk: the old file or the new one, never a part of it."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        partial.replace(self.path)

    def to_json(self) -> Json:
        return {"gpu": "sparsekern", "tiny": self.tiny, "where": self.where, "seconds": self.seconds, "rows": self.rows}


def name_of(where: Json) -> str:
    """<card>-<date>, as a file is called."""
    card = str(where["gpu"] or "no card").lower().removeprefix("nvidia ")
    return "-".join(["".join(c if c.isalnum() else "-" for c in card).strip("-"), str(where["date"])])


def where_am_i(commit: str | None = None) -> Json:
    """What the numbers depend on. Asked in a process of its own, so that this one holds no memory of the card."""
    status, said, why = answer([sys.executable, "-c", MACHINE], env=with_path())
    # the last line: a library may have printed something before it
    facts = json.loads(said.splitlines()[-1]) if status == 0 else {"gpu": None, "error": why[-2000:]}
    facts["driver"] = _driver()
    facts["triton"] = version("triton")
    facts["transformers"] = version("transformers")
    facts["commit"] = commit or facts.get("commit")
    facts["date"] = datetime.now(timezone.utc).date().isoformat()
    return facts


def answer(command: list[str], **options: object) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of a short command; 124 and the reason of one that does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, **options)
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]} did not end within {ANSWER_SECONDS:.0f} s"
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    return done.returncode, done.stdout, done.stderr


def with_path() -> dict[str, str]:
    """The environment of a process that finds sparsekern where it lies beside bench/, installed or not."""
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    _, said, _ = answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return said.split("\n")[0].strip() or None
