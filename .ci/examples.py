"""Runs what the documentation shows: the code blocks of Markdown files, and notebooks from top to bottom.

    python .ci/examples.py WORK README.md docs/*.md notebooks/*.ipynb

Two files run at a time, each in a copy of the project of its own under WORK. In Markdown, ```bash and ```python blocks
run in order; they share one folder, so that what one writes the next can read. Blocks of any other kind (```text,
```yaml) are for reading. A block or cell that fails ends its file; the exit code says whether all passed.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = 'pip install -e ".[test]" && pytest'  # how the test command begins: CI runs it by itself, at the end
LIMIT = 1200  # seconds for one block or notebook
JOBS = 2
# Everything is installed already: installing a copy would put it in the place of the one that the others import.
INSTALL = re.compile(r"^pip install -e \S+( && )?", re.MULTILINE)
# The shipped recipe takes minutes as it stands: here it walks the same road with fewer sentences and less training.
RECIPE = re.compile(r"tfvllm compress examples/sentiment\.yaml(?:.*\\\n)*.*$", re.MULTILINE)
FEWER = ("data.synthetic.train=1500", "data.synthetic.dev=200", "data.synthetic.test=200", "teacher.vocabulary=500")
SHORTER = (
    *("teacher.epochs=1", "distill.epochs=1", "shrink.epochs=1", "benchmark.repeats=5"),
    *("teacher.batch_size=64", "distill.batch_size=64", "shrink.calibration=64"),
)


def shorter(command: re.Match) -> str:
    """The last of several settings counts."""
    settings = SHORTER if "--data" in command[0] else FEWER + SHORTER
    return command[0] + "".join(f" --set {setting}" for setting in settings)


NOT_COPIED = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "out", "runs", "build")


def blocks(text: str):
    """Yields (line, language, code) of every fenced block."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start()].count("\n") + 1, found[1], found[2]


def run(command: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, output and time taken. A server that a failed block leaves behind goes with its process group."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started = time.monotonic()
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0] and time.monotonic() - started < LIMIT:
            time.sleep(0.05)
        code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else -1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if not ended[0]:
            ended = os.wait4(process.pid, 0)
        process.returncode = code
        output.seek(0)
        busy = ended[2].ru_utime + ended[2].ru_stime
        return code, output.read(), f"{time.monotonic() - started:.0f} s ({busy:.0f} s of CPU)"


def steps(file: Path):
    """Yields (place in the file, command) of what there is to run in it."""
    if file.suffix == ".ipynb":
        yield "all cells", [sys.executable, str(Path(__file__).with_name("notebook.py")), file.name, "--brief"]
        return
    for line, language, code in blocks(file.read_text(encoding="utf-8")):
        if language == "bash" and not code.startswith(TESTS):
            yield f"{line}: bash", ["bash", "-euo", "pipefail", "-c", RECIPE.sub(shorter, INSTALL.sub("", code))]
        elif language == "python":
            yield f"{line}: python", [sys.executable, "-c", code]


def check(file: Path, work: Path) -> tuple[int, str]:
    """How many blocks passed, and what is wrong ("" where nothing is)."""
    name = file.relative_to(ROOT)
    todo = list(steps(file))
    if not todo:
        return 0, ""
    folder = work / str(name).replace("/", "-")
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    start = folder / "notebooks" if file.suffix == ".ipynb" else folder
    for place, command in todo:
        code, output, took = run(command, start)
        if code:
            return 0, f"{output[-6000:]}\n{name}:{place} failed with exit code {code}"
        print(f"{name}:{place} passed in {took}", flush=True)
    return len(todo), ""


def main(work: str, *paths: str) -> None:
    files = [Path(path).resolve() for path in paths]
    with ThreadPoolExecutor(JOBS) as pool:
        results = list(pool.map(lambda file: check(file, Path(work)), files))
    problems = [problem for _, problem in results if problem]
    print("\n\n".join(problems))
    count = sum(passed for passed, _ in results)
    if problems or not count:
        sys.exit(f"{len(problems)} of {len(files)} files failed; {count} blocks and notebooks passed")
    print(f"{count} blocks and notebooks passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
