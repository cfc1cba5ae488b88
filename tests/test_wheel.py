"""What an installed tfvllm holds: every file that stands beside its code."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tfvllm"


def beside_code() -> set[str]:
    found = (file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(ROOT)) for file in found if file.suffix not in (".py", ".pyc")}


def declared() -> list[str]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tfvllm"]


def test_every_pattern_finds_a_file_and_every_file_a_pattern():
    by_pattern = {pattern: {str(f.relative_to(ROOT)) for f in PACKAGE.glob(pattern)} for pattern in declared()}
    assert all(by_pattern.values()), [pattern for pattern, files in by_pattern.items() if not files]
    assert set().union(*by_pattern.values()) == beside_code()
    assert "tfvllm/py.typed" in beside_code()


@pytest.mark.thorough
def test_a_wheel_holds_all_of_it(tmp_path):
    source = tmp_path / "source"  # setuptools builds in place
    shutil.copytree(PACKAGE, source / "tfvllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", str(source), *options, "--wheel-dir", str(tmp_path / "wheels")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "wheels").glob("tfvllm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert beside_code() <= names
    modules = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    into = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(into), str(wheel)],
                   check=True, capture_output=True)  # fmt: skip
    assert (into / "tfvllm" / "py.typed").is_file()
    program = (
        "import tfvllm.cli, tfvllm.serving.served_ops as o; print(tfvllm.cli.__file__, len(o.served('2.20')) > 1000)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
                           env={"PYTHONPATH": str(into), "PATH": "/usr/bin:/bin"}, check=True)  # fmt: skip
    assert shown.stdout.split() == [str(into / "tfvllm" / "cli" / "__init__.py"), "True"]
