"""Generation of other families than GPT-2 against keras-nlp's own `generate`, greedy, random weights, in turns.

    python benchmarks/families.py [--only PATTERN] [--batch 1 --batch 8] [--repeats 5]

Two claims. A mixture of experts reads what its tokens are routed to: Mixtral's shape with 8 experts, 2 for each token.
The general path, by keras-nlp's own step, is not slower than keras-nlp: an ordinary decoder whose reader is not asked.

Writes benchmarks/results/families.json and .txt; a row measured anew takes its old one's place.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import keras
import keras_nlp

import tfvllm
from tfvllm.bench import generate as bench
from tfvllm.bench import results
from tfvllm.families import registry

OUT = Path(__file__).parent / "results" / "families.json"
M = keras_nlp.models
SIZES = {"vocabulary_size": 16384, "num_layers": 6, "hidden_dim": 512}
GROUPED = {"num_query_heads": 8, "num_key_value_heads": 2}


def mixtral() -> keras.Model:
    backbone = M.MixtralBackbone(intermediate_dim=1792, num_experts=8, top_k=2, sliding_window=None, **SIZES, **GROUPED)
    return M.MixtralCausalLM(backbone, None)


def llama() -> keras.Model:
    return M.LlamaCausalLM(M.LlamaBackbone(intermediate_dim=1792, **SIZES, **GROUPED), None)


def gpt2() -> keras.Model:
    backbone = M.GPT2Backbone(num_heads=8, intermediate_dim=2048, max_sequence_length=256, **SIZES)
    return M.GPT2CausalLM(backbone, None)


# name -> (model, whether its reader is asked, options of the exports by their names)
MODELS: dict[str, tuple[Callable[[], keras.Model], bool, dict[str, dict]]] = {
    "Mixtral, 8 experts, top 2": (
        mixtral,
        True,
        {"tfvllm": {}, "tfvllm onednn": {"target": "onednn"}, "tfvllm bfloat16": {"precision": "bfloat16"}},
    ),
    "Llama, general path": (llama, False, {"tfvllm": {}}),
    "GPT-2, general path": (gpt2, False, {"tfvllm": {}}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a pattern; other models are left as they are")
    parser.add_argument("--batch", type=int, action="append", help="default 1 and 8")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    for name, (make, asked, exports) in MODELS.items():
        if not re.search(given.only, name):
            continue
        keras.utils.set_random_seed(0)
        model = make()
        with tempfile.TemporaryDirectory() as folder:
            candidates = {"keras-nlp": bench.keras_model(model)}
            for title, options in exports.items():
                path = Path(folder) / title / "1"
                with contextlib.nullcontext() if asked else mock.patch.object(registry, "READERS", {}):
                    tfvllm.export(model, path, task="generate", max_length=128, check=None, **options)
                candidates[title] = bench.saved_model(path)
            pieces = [measured(candidates, batch, given) for batch in given.batch or (1, 8)]
        known = json.loads(given.out.read_text())["results"] if given.out.exists() else {}
        row = {"parameters": model.count_params(), "conditions": results.conditions(), "pieces": pieces}
        results.write_json(given.out, "generation of other families", {**known, name: row})
    text = table(json.loads(given.out.read_text())["results"])
    given.out.with_suffix(".txt").write_text(text)
    print(text)


def measured(candidates: dict, batch: int, given: argparse.Namespace) -> dict:
    ids, lengths = bench.prompts(batch, 16, 48, SIZES["vocabulary_size"])
    found = bench.measure(candidates, ids, lengths, given.new_tokens, repeats=given.repeats)
    return {"batch": batch, "prompt": [16, 48], "new_tokens": given.new_tokens, "models": found}


def table(found: dict) -> str:
    lines = []
    for name, row in found.items():
        conditions = row["conditions"]
        machine = conditions["machine"]
        lines += [
            f"{name}: {row['parameters'] / 1e6:.0f} M parameters; {conditions['date']}, commit {conditions['commit']}, "
            f"{machine['cores']} cores {machine['cpu']}",
            bench.table(row["pieces"]),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
