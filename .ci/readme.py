"""Runs the code blocks of a Markdown file, in order, in a copy of the project.

```bash and ```python blocks run; they share one folder, so that what one writes the next can read. Blocks of any other
kind (```text, ```yaml, ```console) are for reading. A block that fails ends the run with its line number.

The recipe of the copy has a tenth of the example's sentences (see FEWER): the commands and every step of the road are
those of the README. With TFVLLM_README_WHOLE=1 the recipe stays as it is.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = 'pip install -e ".[test]" && pytest -n 2 --dist loadfile'  # CI runs it by itself, at the end
FEWER = {"examples/sentiment.yaml": ("train: 20000, dev: 2000, test: 2000", "train: 2000, dev: 400, test: 400")}

LIMIT = 1800  # seconds for one block


def blocks(text: str):
    """Yields (line, language, code) of every fenced block."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start()].count("\n") + 1, found[1], found[2]


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and output. A server that a failed block leaves behind goes with the block's process group."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            code = -1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        return code, output.read()


def main(path: str, work: str) -> None:
    source = Path(path).resolve()
    folder = Path(work) / "readme"
    ignored = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", "out", "runs", "build", ".venv")
    shutil.copytree(source.parent, folder, ignore=ignored)
    if os.environ.get("TFVLLM_README_WHOLE") != "1":
        for name, (whole, part) in FEWER.items():
            recipe = (folder / name).read_text(encoding="utf-8")
            assert whole in recipe, f"{name} has no {whole!r} any more; bring FEWER up to date"
            (folder / name).write_text(recipe.replace(whole, part), encoding="utf-8")
            print(f"{name}: {part} in place of {whole}")
    count = 0
    for line, language, code in blocks(source.read_text(encoding="utf-8")):
        if language not in ("bash", "python") or code.strip() == TESTS:
            continue
        started = time.monotonic()
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        code, output = run(command, folder)
        seconds = time.monotonic() - started
        count += 1
        if code:
            print(output[-6000:])
            sys.exit(f"{path}:{line}: this {language} block failed with exit code {code}")
        print(f"{path}:{line}: {language} block passed in {seconds:.0f} s", flush=True)
    if not count:
        sys.exit(f"{path}: no code block was found to run")


if __name__ == "__main__":
    main(*sys.argv[1:])
