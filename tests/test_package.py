"""The package as a whole: lazy, quiet, and walls where they should be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfvllm

ROOT = Path(tfvllm.__file__).parent


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_is_lazy_and_silent():
    result = run(
        "import sys, tfvllm\n"
        "heavy = {'tensorflow', 'keras', 'keras_nlp', 'numpy', 'rich', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'Distiller' in dir(tfvllm) and callable(tfvllm.__getattr__)\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.thorough
def test_keras_and_tf_keras_stay_what_they_were():
    result = run(
        "import os, keras, tensorflow as tf\n"
        "before = (keras.Model, keras.layers.Layer, keras.config.floatx(), keras.backend.backend(), tf.keras.Model)\n"
        "import sys, tfvllm, tfvllm.pruning.shrinking\n"
        "assert 'tensorflow_model_optimization' not in sys.modules  # shrinking does without TFMOT\n"
        "tfvllm.PolynomialDecay, tfvllm.callbacks.MagnitudePruning, tfvllm.Distiller, tfvllm.shrink, tfvllm.simplify\n"
        "tfvllm.PolynomialDecay(0.0, 0.5, 0, 10)\n"
        "after = (keras.Model, keras.layers.Layer, keras.config.floatx(), keras.backend.backend(), tf.keras.Model)\n"
        "assert before == after, (before, after)\n"
        "assert tf.keras.Model is keras.Model and 'TF_USE_LEGACY_KERAS' not in os.environ\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", ["import tfvllm.export.exporter, tfvllm", "import tfvllm; import tfvllm.export"])
def test_export_is_a_function_in_any_order_of_imports(order):
    result = run(
        f"{order}\nassert callable(tfvllm.export)\nfrom tfvllm.export import TASKS\nassert 'classify' in TASKS"
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_can_be_had():
    for name in tfvllm.__all__:
        assert getattr(tfvllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = tfvllm.distil


# room -> its floor; arrows between rooms go down only. CONTRIBUTING.md has the picture.
FLOORS = {
    **dict.fromkeys(("errors", "files", "html", "timing", "summaries", "data", "_version"), 0),
    "savedmodel": 1,
    "quietly": 2,
    "families": 2,
    "models": 3,
    "graph": 3,
    "rules": 4,
    **dict.fromkeys(("simplifier", "pruning", "distillation", "generation"), 5),
    "export": 6,
    **dict.fromkeys(("serving", "rollouts"), 7),
    "bench": 8,
    "compress": 9,
    "cli": 10,
    # The front door: what users import, and nothing in the house does.
    **dict.fromkeys(("callbacks", "losses", "schedules", "__main__", "tfvllm"), 11),
}
NO_KERAS = {"graph", "rules", "savedmodel"}
KERAS = {"keras", "keras_nlp", "keras_hub", "tf_keras", "tensorflow_text"}  # the last one imports Keras
LARGEST_ROOM = 0.13  # of all lines
LONGEST_FILE = 450  # lines
# A longer file, and why.
LONGER = {
    "bench/serve.py": "one load generator, whose parts share its counters",
    "distillation/distiller.py": "one Keras Model, most of it what `fit`, `evaluate` and `predict` are overridden with",
    "families/base.py": "the vocabulary of the adapters",
    "serving/lint.py": "one check after another",
}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    return [*module.split("."), "tfvllm"][1]


def imports(file: Path):
    """Every import of a file, lazy ones too: (module, name or None)."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.name


def arrows() -> dict[str, set[str]]:
    """module -> the modules of tfvllm that it imports."""
    found: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        named = {f"{base}.{name}" if f"{base}.{name}" in MODULES else base for base, name in imports(file)}
        found[module] = (named & set(MODULES)) - {module}
    return found


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} == set(FLOORS)


def test_arrows_go_down():
    wrong = []
    for module, others in arrows().items():
        for other in others - {"tfvllm"}:
            here, there = room_of(module), room_of(other)
            if here != there and here != "tfvllm" and FLOORS[there] >= max(FLOORS[here], 1):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_circles():
    """Not by lazy imports either. The package itself, lazy by design, is no part of any."""
    left = {module: others - {"tfvllm"} for module, others in arrows().items() if module != "tfvllm"}
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert left == {}


def test_what_is_private_stays_in_its_file():
    wrong = [
        f"{module} imports {base}.{name}"
        for module, file in MODULES.items()
        for base, name in imports(file)
        if base.startswith("tfvllm") and base != "tfvllm._version" and (name or "").startswith("_")
    ]
    assert wrong == []


@pytest.mark.parametrize("room", sorted(NO_KERAS))
def test_rooms_without_keras(room):
    for file in (ROOT / room).rglob("*.py"):
        assert not KERAS & {base.split(".")[0] for base, _ in imports(file)}, file


def test_rooms_and_files_are_not_too_large():
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in MODULES.items()}
    rooms: dict[str, int] = {}
    for module, count in lines.items():
        rooms[room_of(module)] = rooms.get(room_of(module), 0) + count
    assert {room for room, count in rooms.items() if count > LARGEST_ROOM * sum(lines.values())} == set()
    long = {str(MODULES[module].relative_to(ROOT)) for module, count in lines.items() if count > LONGEST_FILE}
    assert long == set(LONGER), "a reason in LONGER for each longer file, and none for others"


def test_the_wall_test_sees_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from tfvllm.graph import ir\n    import keras.layers\n")
    assert set(imports(file)) == {("tfvllm.graph", "ir"), ("keras.layers", None)}
