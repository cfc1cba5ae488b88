"""The newcomer's path, timed: clone, a fresh virtual environment, install, then every block of docs/newcomer.md.

    python benchmarks/newcomer.py

Clones what is committed here to a temporary folder; packages come from wherever pip is told to look, so the time of the
install is also that of the network. Writes benchmarks/results/newcomer.json and .txt.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tfvllm.bench.results import text_table, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def blocks(page: str) -> list[tuple[str, str]]:
    """(heading, commands) of every bash block, in order."""
    found, heading = [], ""
    for match in re.finditer(r"^## +([^\n]*)$|^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        else:
            found.append((heading, match[2]))
    return found


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "tfvllm"
        path = f"{project}/.venv/bin{os.pathsep}{os.environ['PATH']}"

        def timed(step: str, commands: str, cwd: Path) -> None:
            started = time.monotonic()
            subprocess.run(
                ["bash", "-euo", "pipefail", "-c", commands], cwd=cwd, env=os.environ | {"PATH": path}, check=True
            )
            rows.append({"step": step, "seconds": round(time.monotonic() - started, 1)})
            print(rows[-1], flush=True)

        timed("clone", f"git clone -q '{ROOT}' tfvllm", Path(folder))
        timed("virtual environment and install", f"'{sys.executable}' -m venv .venv && pip install -q -e .", project)
        page = (ROOT / "docs" / "newcomer.md").read_text(encoding="utf-8")
        for heading, commands in blocks(page):
            first = commands.strip().splitlines()[0].rstrip(" \\")
            timed(f"{heading}: {first}", commands, project)
    rows.append({"step": "all", "seconds": round(sum(row["seconds"] for row in rows), 1)})
    shown = text_table(("step", "seconds"), [(row["step"], f"{row['seconds']:.0f}") for row in rows])
    print(shown)
    write_json(RESULTS / "newcomer.json", "docs/newcomer.md in a fresh clone and virtual environment", rows)
    (RESULTS / "newcomer.txt").write_text(shown + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
