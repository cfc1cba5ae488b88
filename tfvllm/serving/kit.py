"""The serving kit: what it takes to put an exported model behind TF Serving, in Docker or under KServe.

Written into `base/serving-kit/`, beside the versions (TF Serving looks at folders with numbers only):

    batching_parameters.txt   sizes chosen by measuring this model here
    models.config             for --model_config_file
    Dockerfile                TF Serving's image with the model in it
    inference-service.yaml    KServe
    README.md                 what was measured, and how to use the rest
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tfvllm.files import new_directory, write_text
from tfvllm.savedmodel import manifest, warmup
from tfvllm.serving import config, deployment, lint
from tfvllm.serving.batching import BatchingOptions, is_batchable, row_count
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.servable import Servable, find_saved_model

FOLDER = "serving-kit"
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def write(directory: str | os.PathLike, *, name: str | None = None, seconds: float = 6.0) -> Path:
    """Writes the kit for the SavedModel in `directory` (`base/1`, or `base`) into `base/serving-kit`.

    Args:
        name: the model's name in requests; default: the base folder's.
        seconds: about how long to measure.

    Returns the kit's folder. An older kit is replaced.

    Example:
        >>> from tfvllm.serving import kit
        >>> path = tfvllm.export(tiny_net(), folder / "kit" / "1", task="classify", warmup=False)
        >>> sorted(file.name for file in kit.write(path, seconds=0.1).iterdir())[:2]
        ['Dockerfile', 'README.md']
    """
    folder = find_saved_model(directory)
    base = folder.parent if folder.resolve().name.isdigit() else folder
    name = model_name(folder, name)
    measured = measure(folder, seconds=seconds)
    report = lint.lint(folder, run=False)
    refused = lint.unbatched(report)
    options = dataclasses.replace(choose(measured), pad_variable_length_inputs=lint.pads(report))
    cores = os.cpu_count() or 1
    slots = 1 if measured and measured["run_ms"].get(options.max_batch_size, 0) > 50 else cores
    document = manifest.read(folder)
    memory = deployment.memory(folder, document, target=report.target, rows=options.max_batch_size, runs=slots)
    service = inference_service(name, cores, memory=memory.quantity, batching=not refused)
    head = _NOT_FOR_TF_SERVING if refused else ""
    with new_directory(base / FOLDER, overwrite=True) as partial:
        write_text(partial / "batching_parameters.txt", head + config.write_batching(options, slots=slots))
        write_text(partial / "models.config", config.write_models([ModelConfig(name, Path(f"/models/{name}"))]))
        write_text(partial / "Dockerfile", dockerfile(name, report.target, batching=not refused))
        write_text(partial / "inference-service.yaml", yaml.safe_dump(service, sort_keys=False, allow_unicode=True))
        text = _readme(name, document, options, slots, measured, report.target, refused, memory)
        write_text(partial / "README.md", text)
    return base / FOLDER


_NOT_FOR_TF_SERVING = (
    "# For tfvllm serve, which batches by signature. Not for tensorflow_model_server --enable_batching, which would\n"
    "# refuse some of this model's signatures: README.md says which.\n"
)


def model_name(directory: str | os.PathLike, name: str | None = None) -> str:
    """The name under which the SavedModel in `directory` (`base/1`, or `base`) is served: `name`, or the base folder's.

    Raises InputError where TF Serving or its Docker image would not take it.
    """
    folder = Path(directory).resolve()
    return deployment.check_name(name or (folder.parent if folder.name.isdigit() else folder).name)


def measure(directory: str | os.PathLike, *, seconds: float = 6.0) -> dict[str, Any] | None:
    """Runs the model's own warm-up rows in batches of 1, 2, 4, … and times them.

    Returns `{"signature", "run_ms": {size: median}, "rows_per_s": {size: rate}}`, or None where the model has no
    warm-up requests or its main signature does not batch.
    """
    requests = warmup.read(directory)
    if not requests:
        return None
    servable = Servable(directory)
    try:
        name, rows = _rows(servable, requests)
        if not rows:
            return None
        medians: dict[int, float] = {}
        for size in _SIZES:
            batch = {
                key: np.resize(value, (size, *value.shape[1:])) if value.ndim else value for key, value in rows.items()
            }
            servable.run(name, batch)
            times: list[float] = []
            end = time.perf_counter() + seconds / len(_SIZES)
            while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
                start = time.perf_counter()
                servable.run(name, batch)
                times.append(time.perf_counter() - start)
            medians[size] = 1000 * float(np.median(times))
            if medians[size] > 1000 * seconds:
                break
    finally:
        servable.close()
    rates = {size: 1000 * size / median for size, median in medians.items()}
    return {"signature": name, "run_ms": medians, "rows_per_s": rates}


def _rows(servable: Servable, requests) -> tuple[str, dict[str, np.ndarray]]:
    """The largest warm-up request of the main signature, as one set of rows."""
    best: tuple[int, str, dict] = (0, "", {})
    for name, inputs in requests:
        signature = servable.signatures.get(name)
        if signature is None or not is_batchable(signature):
            continue
        count = row_count(signature, inputs) or 0
        preferred = count + (1000 if name == "serving_default" else 0)
        if preferred > best[0]:
            best = (preferred, name, inputs)
    return best[1], best[2]


def choose(measured: Mapping[str, Any] | None) -> BatchingOptions:
    """Batching options from a measurement: the smallest batch that reaches 95 % of the best rate, powers of two up to
    it as allowed sizes, and a wait of a tenth of a run for company, at most 5 ms."""
    if not measured:
        return BatchingOptions(max_batch_size=32, batch_timeout_ms=1.0, allowed_batch_sizes=(1, 2, 4, 8, 16, 32))
    rates = measured["rows_per_s"]
    best = max(rates.values())
    size = min(size for size, rate in rates.items() if rate >= 0.95 * best)
    timeout = min(5.0, 0.1 * measured["run_ms"][size])
    sizes = tuple(2**i for i in range(int(math.log2(size)) + 1))
    return BatchingOptions(max_batch_size=size, batch_timeout_ms=round(timeout, 3), allowed_batch_sizes=sizes)


def dockerfile(name: str, target: str, *, batching: bool = True) -> str:
    """A Dockerfile to be built in the base folder: `docker build -f serving-kit/Dockerfile -t NAME .`."""
    onednn = "" if target == "portable" else "# The model uses oneDNN's kernels: the image must have them linked.\n"
    flags = ["--rest_api_timeout_in_ms=60000"]
    if batching:
        flags = [*_batching_flags(f"/models/{name}"), *flags]
    return f"""{onednn}ARG TFS_VERSION=latest
FROM tensorflow/serving:${{TFS_VERSION}}
# Versions only: TF Serving ignores folders without a number.
COPY . /models/{name}
ENV MODEL_NAME={name} TF_ENABLE_ONEDNN_OPTS=1
EXPOSE 8500 8501
CMD {json.dumps(flags, ensure_ascii=False)}
"""


def _batching_flags(base: str) -> list[str]:
    return ["--enable_batching=true", f"--batching_parameters_file={base}/{FOLDER}/batching_parameters.txt"]


def inference_service(
    name: str,
    cores: int,
    *,
    memory: str = "2Gi",
    batching: bool = True,
    storage: str | None = None,
    replicas: tuple[int, int] = (1, 4),
) -> dict:
    """A KServe InferenceService (serving.kserve.io/v1beta1) that runs TF Serving on the base folder.

    Args:
        memory: a Kubernetes quantity; see `tfvllm.serving.deployment.memory`.
        batching: whether TF Serving may batch every signature.
        storage: where the base folder is (pvc://, s3://, gs://, …); default: a volume claim `models`.
        replicas: fewest and most; KServe scales on the requests under way.
    """
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": deployment.cluster_name(name),
            "labels": {"app.kubernetes.io/part-of": "tfvllm"},
            "annotations": {"tfvllm/model": name},
        },
        "spec": {
            "predictor": {
                "minReplicas": replicas[0],
                "maxReplicas": replicas[1],
                "scaleMetric": "concurrency",
                "scaleTarget": 8,
                "timeout": 60,
                "model": {
                    "modelFormat": {"name": "tensorflow"},
                    "protocolVersion": "v1",
                    "storageUri": storage or f"pvc://models/{name}",
                    **({"args": _batching_flags("/mnt/models")} if batching else {}),
                    "env": [{"name": "TF_ENABLE_ONEDNN_OPTS", "value": "1"}],
                    "resources": {
                        "requests": {"cpu": str(cores), "memory": memory},
                        "limits": {"cpu": str(cores), "memory": memory},
                    },
                },
            }
        },
    }


def _readme(name, document, options, slots, measured, target, refused, memory) -> str:
    rows = ""
    if measured:
        rows = "\n".join(
            f"| {size} | {median:.2f} | {measured['rows_per_s'][size]:.0f} |"
            for size, median in measured["run_ms"].items()
        )
        rows = f"| rows in a run | ms (median) | rows/s |\n|---:|---:|---:|\n{rows}\n\n"
    generates = document.get("task") in ("generate", "translate")
    threads = (
        "- One intra-op thread is faster for single generate requests and slower for large batches: try\n"
        "  `--tensorflow_intra_op_parallelism=1`. It is a setting of the process and cannot be stored in the model.\n"
        if generates
        else ""
    )
    basis = (
        f"measured here with the warm-up rows of `{measured['signature']}`"
        if measured
        else "a usual choice: the model has no warm-up rows that batch, so nothing could be measured"
    )
    flags = "" if refused else " --enable_batching=true\n  --batching_parameters_file=batching_parameters.txt"
    cluster = deployment.cluster_name(name)
    return f"""# Serving {name}

Target: {target}. `batching_parameters.txt` has max_batch_size {options.max_batch_size} and {slots} batch thread(s),
{basis}.

{rows}{_on_batching(refused)}
- TF Serving: `tensorflow_model_server --port=8500 --rest_api_port=8501
  --model_config_file=models.config{flags}`, with your paths in models.config.
- Docker, in the folder above: `docker build -f {FOLDER}/Dockerfile -t {cluster} .`, then
  `docker run -p 8500:8500 -p 8501:8501 {cluster}`. Name the server's version with `--build-arg TFS_VERSION=…`.
- KServe: put the folder above on a volume or bucket, set `storageUri`, then `kubectl apply -f inference-service.yaml`.
  There the model is called `{cluster}`. The servers hold no state: replicas may be added and removed at will.
- Without any of these: `tfvllm serve {name}=DIR --grpc-port 8500 --batching-parameters-file batching_parameters.txt`.
{threads}- New versions: `tfvllm versions publish SRC BASE` puts one beside the old one, whole at once; `rollback`
  takes it away again.

## Memory: {memory.quantity}

1.2 × (TensorFlow {_mib(memory.base)} MiB + 2 × weights and graph {_mib(memory.weights)} MiB
+ packed copies of weights {_mib(memory.packed)} MiB
+ {memory.runs} run(s) × (activations {_mib(memory.activations)} MiB + caches {_mib(memory.caches)} MiB)),
for {options.max_batch_size} rows in a run at their longest. Weights count twice because a new version is loaded
beside the one in service. It is reckoned from the files and the manifest, not measured: watch the first servers.
"""


def _mib(size: int) -> str:
    return f"{size / deployment.MIB:.1f}"


def _on_batching(refused: Mapping[str, str]) -> str:
    if not refused:
        return ""
    listed = "\n".join(f"  - `{signature}`: {reason}" for signature, reason in refused.items())
    return f"""- TF Serving's batching is off: `--enable_batching` is for all signatures of a server, and would refuse

{listed}

  `tfvllm serve` batches what can be. For TF Serving, a model with one signature that has rows only can be batched:
  `tfvllm simplify SRC DST --signature serving_default`.
"""
