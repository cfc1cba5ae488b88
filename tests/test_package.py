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


ROOMS = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()} | {"recipe"}
# room -> rooms it must not know
FORBIDDEN = {
    "graph": {"models", "pruning", "distillation", "generation", "export", "serving", "bench", "compress", "cli"},
    "rules": {"models", "pruning", "distillation", "generation", "export", "serving", "bench", "compress", "cli"},
    "models": {
        "graph",
        "rules",
        "pruning",
        "distillation",
        "generation",
        "export",
        "serving",
        "bench",
        "compress",
        "cli",
    },
    "pruning": {"graph", "rules", "generation", "export", "serving", "bench", "compress", "cli"},
    "distillation": {"graph", "rules", "export", "serving", "bench", "compress", "cli"},
    "generation": {"distillation", "pruning", "export", "serving", "bench", "compress", "cli"},
    "export": {"distillation", "pruning", "compress", "cli"},  # the serving kit writes what the server reads
    "serving": {"distillation", "pruning", "compress", "cli"},
}
NO_KERAS = {"graph", "rules"}
# A door between neighbours: the pruning report times as the benchmarks do.
DOORS = {("pruning", "tfvllm.timing")}


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_arrows_point_one_way(room):
    for file in (ROOT / room).rglob("*.py"):
        for name in imports(file):
            parts = name.split(".")
            door = any(room == a and name.startswith(b) for a, b in DOORS)
            if parts[0] == "tfvllm" and len(parts) > 1 and not door:
                assert parts[1] not in FORBIDDEN[room], f"{file.relative_to(ROOT)} imports {name}"
            if room in NO_KERAS:
                assert parts[0] not in ("keras", "keras_nlp", "keras_hub", "tf_keras"), f"{file.name} imports {name}"


def test_the_wall_test_sees_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from tfvllm.graph import ir\n    import keras.layers\n")
    assert {"tfvllm.graph", "tfvllm.graph.ir", "keras.layers"} <= set(imports(file))
