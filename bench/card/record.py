"""record: the rows of a run, kept in a JSON file as they come, so that a run that is cut off keeps what it had."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

Json = dict[str, object]

WRITE_EVERY_S = 1.0
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
    _written: float = 0.0

    def add(self, row: Json) -> None:
        """Keep a row; it is on the disk a second later."""
        self.rows.append(row)
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Put everything on the disk: the old file or the new one, never a part of it."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        partial.replace(self.path)
        self._written = time.monotonic()

    def to_json(self) -> Json:
        return {"gpu": "sparsekern", "tiny": self.tiny, "where": self.where, "seconds": self.seconds, "rows": self.rows}


def name_of(where: Json) -> str:
    """<card>-<date>, as a file is called."""
    card = str(where["gpu"] or "no card").lower().removeprefix("nvidia ")
    return "-".join(["".join(c if c.isalnum() else "-" for c in card).strip("-"), str(where["date"])])


def where_am_i(commit: str | None = None) -> Json:
    """What the numbers depend on. Asked in a process of its own, so that this one holds no memory of the card."""
    asked = subprocess.run([sys.executable, "-c", MACHINE], capture_output=True, text=True, env=with_path())
    facts = json.loads(asked.stdout) if asked.returncode == 0 else {"gpu": None, "error": asked.stderr[-2000:]}
    facts["driver"] = _driver()
    facts["triton"] = _version("triton")
    facts["transformers"] = _version("transformers")
    facts["commit"] = commit or facts.get("commit")
    facts["date"] = datetime.now(timezone.utc).date().isoformat()
    return facts


def with_path() -> dict[str, str]:
    """The environment of a process that finds sparsekern where it lies beside bench/, installed or not."""
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return None
    return asked.stdout.split("\n")[0].strip() or None
