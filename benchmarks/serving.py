"""`tfvllm serve` with and without dynamic batching: REST and gRPC; closed clients, constant and Poisson arrivals.

    python benchmarks/serving.py                       the shipped sentiment student
    python benchmarks/serving.py DIR --rate 200        another text model, other arrival rates (requests/s)

Writes benchmarks/results/serving.json and .txt. One server runs at a time, as a process of its own; the clients, one
text a request, run in this process on the same cores, as a load generator on a laptop does. The unbatched server is
also measured with a run on each core, which suits it best.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tfvllm.bench import results, serve
from tfvllm.serving import loop

ROOT = Path(__file__).parents[1]
SERVERS = {
    "batched": (),
    "unbatched": ("--no-batching",),
    "unbatched, a run on each core": ("--no-batching", f"--slots={os.cpu_count() or 1}"),
}


def measure(model: Path, protocol: str, server: str, arrivals: list[tuple[str, float | None]], options) -> list[dict]:
    """Starts one server and measures it under each kind of arrival."""
    found = []
    with serve.serving(model, (*SERVERS[server], "--grpc-port", "0")) as addresses:
        for kind, rate in arrivals:
            load = serve.load(
                serve.client_for(addresses[protocol == "grpc"]),
                label=server,
                arrivals=kind,
                rate=rate,
                clients=options.clients,
                seconds=options.seconds,
            )
            result = loop.run(load)
            found.append({"protocol": protocol, **result.to_dict()})
            print(protocol, serve._line(result), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "saved_models" / "sentiment")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rate", type=float, default=300.0, help="requests/s of the constant and Poisson arrivals")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    options = parser.parse_args()
    before = results.conditions()["machine"]["load_before"]
    arrivals = [("closed", None), ("constant", options.rate), ("poisson", options.rate)]
    rows = [
        row
        for protocol in ("rest", "grpc")
        for server in SERVERS
        for row in measure(options.model, protocol, server, arrivals, options)
    ]
    closed = {(row["protocol"], row["label"]): row["per_second"] for row in rows if row["arrivals"] == "closed"}
    ratios = {
        protocol: {
            server: round(closed[protocol, "batched"] / closed[protocol, server], 2)
            for server in SERVERS
            if server != "batched"
        }
        for protocol in ("rest", "grpc")
    }
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    content = {"model": options.model.name, "load_before": before, "batched_over": ratios, "rows": rows}
    results.write_json(folder / "serving.json", "serving", content)
    headers = ["protocol, server, arrivals", "requests/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "failed"]
    table = results.text_table(
        headers,
        [
            [
                f"{row['protocol']}, {row['label']}, {row['arrivals']}"
                + (f" {row['rate']:g}/s" if row["rate"] else ""),
                *(f"{row[key]:.1f}" for key in ("per_second", "p50_ms", "p95_ms", "p99_ms", "max_ms")),
                row["failed"],
            ]
            for row in rows
        ],
    )
    text = f"{options.model.name}, {options.clients} clients, one text a request\n\n{table}\n\n"
    for protocol, found in ratios.items():
        for server, ratio in found.items():
            text += f"{protocol}: batched serves {ratio:.2f} times the requests of {server}\n"
    (folder / "serving.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
