"""The whole road: what each stage of `tfvllm compress RECIPE` gave and cost, as the run's own report has it.

    python benchmarks/road.py examples/sentiment.yaml
    python benchmarks/road.py examples/sst2_minilm.yaml --data ../shared/data/sst2 --out runs/sst2

Runs the recipe (goes on with what is in `--out`), then writes benchmarks/results/road-<name of the recipe>.json and
.txt. All stages are timed in turns in one run: strings in, tokenizer inside the graph.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tfvllm.bench.results import text_table
from tfvllm.files import write_text

RESULTS = Path(__file__).parent / "results"


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a stage, in the order of the road; the first is what ratios are against."""
    base = report["summary"]["against"]
    found = []
    for name in report["latency"][0]["models"]:
        scores = report["accuracy"][name]
        latency = {}
        for row in report["latency"]:
            of = row["models"]
            latency[str(tuple(row["shape"]))] = {
                **of[name],
                "times_faster": round(of[base]["median_ms"] / of[name]["median_ms"], 2),
            }
        found.append(
            {
                "stage": name,
                "mb": round(report["saved_models"][name]["bytes"] / 1e6, 2),
                **{f"{split}_accuracy": round(100 * score, 2) for split, score in scores.items()},
                "latency": latency,
                "sentences_per_second": report["throughput"]["models"][name]["sentences_per_second"],
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    splits = [key for key in found[0] if key.endswith("_accuracy")]
    shapes = list(found[0]["latency"])
    headers = [
        "stage",
        "MB",
        *(f"{split.removesuffix('_accuracy')} accuracy %" for split in splits),
        *(f"ms at {shape} (x)" for shape in shapes),
        "sentences/s",
    ]
    body = []
    for row in found:
        times = (row["latency"][shape] for shape in shapes)
        body.append(
            [
                row["stage"],
                f"{row['mb']:.2f}",
                *(f"{row[split]:.2f}" for split in splits),
                *(f"{t['median_ms']:.2f} ({t['times_faster']:.1f})" for t in times),
                f"{row['sentences_per_second']:.0f}",
            ]
        )
    return text_table(headers, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", help="real sentences in place of the recipe's own")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/<name of the recipe>)")
    options = parser.parse_args()
    name = options.recipe.stem
    out = options.out or Path("runs") / name
    resume = ["--resume"] if out.exists() else []
    data = ["--data", options.data] if options.data else []
    started = time.monotonic()
    subprocess.run(["tfvllm", "compress", str(options.recipe), *data, "--out", str(out), *resume], check=True)
    took = time.monotonic() - started
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = rows(report)
    seconds = {stage["stage"]: stage["seconds"] for stage in report["stages"] if "seconds" in stage}
    results = {"rows": found, "summary": report["summary"], "stage_seconds": seconds}
    if not resume:
        results["whole_run_seconds"] = round(took)
    content = {"what": f"tfvllm compress {options.recipe}", "conditions": report["conditions"], "results": results}
    shown = table(found)
    print(shown)
    write_text(RESULTS / f"road-{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(RESULTS / f"road-{name}.txt", shown + "\n")


if __name__ == "__main__":
    main()
