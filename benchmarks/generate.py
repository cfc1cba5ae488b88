"""Generation at GPT-2's 124M shape, random weights, mixed prompt lengths: tfvllm against keras-nlp, torch, CTranslate2.

    python benchmarks/generate.py --folder /tmp/gpt2 --make       writes the models once
    python benchmarks/generate.py --folder /tmp/gpt2 --piece 8    one piece: a batch size, "prefill" or "load"
    python benchmarks/generate.py --folder /tmp/gpt2              everything that is wanted, one piece after the other

Writes benchmarks/results/generate.json and .txt; a piece measured anew takes its old one's place. Every candidate has a
process of its own (their libraries do not live together well) and all cores; in a piece they take turns, so that one
works at a time. All hold the same weights and answer the same prompts greedily with `--new-tokens` tokens for each row;
keras-nlp fills every row up to the longest prompt plus that many, which is how it generates. The bandwidth limit is the
rate of steps at which all weights could be read from memory once for each step, measured in the same piece.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from tfvllm.bench import generate as bench
from tfvllm.bench import results

RESULTS = Path(__file__).parent / "results"
VOCABULARY, LAYERS, HEADS, WIDTH, INNER, POSITIONS = 50257, 12, 12, 768, 3072, 1024
BASE = "keras-nlp float32"
VARIANTS = {
    "tfvllm float32": {},
    "tfvllm float32 onednn": {"target": "onednn"},
    "tfvllm bfloat16": {"precision": "bfloat16"},
    "tfvllm bfloat16 portable": {"precision": "bfloat16", "target": "portable"},
}
# tokens/s over keras-nlp float32 that the project wants at batch 1, 8, 32
WANTED = {"tfvllm float32": {1: 1.3, 8: 2.2, 32: 3.0}, "tfvllm bfloat16": {1: 2.2, 8: 3.5, 32: 5.5}}
PIECES = ("1", "8", "32", "prefill", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the models are, or are to be written; default a new one")
    parser.add_argument("--make", action="store_true", help="only write the models")
    parser.add_argument("--piece", action="append", help="a batch size, prefill or load; may repeat; default all")
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 64])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick look")
    parser.add_argument("--only", action="append", help="only candidates whose names hold this; may repeat")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        folder = options.folder or Path(passing)
        if not (folder / "weights.npz").exists():
            in_process(make_models, folder, options.layers)
            in_process(make_ctranslate2, folder)
        if options.make:
            return
        for piece in options.piece or PIECES:
            found = measure(piece, folder, options)
            known = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
            results.write_json(options.out, "generate, GPT-2 124M shape, random weights", {**known, piece: found})
    text = table(json.loads(options.out.read_text())["results"])
    options.out.with_suffix(".txt").write_text(text)
    print(text)


def measure(piece: str, folder: Path, options) -> dict:
    """One piece: every candidate in its own process, taking turns."""
    conditions = results.conditions()
    candidates = {
        BASE: functools.partial(keras_candidate, folder),
        **{name: functools.partial(saved_candidate, folder / name.replace(" ", "_")) for name in VARIANTS},
        "torch float32": functools.partial(torch_candidate, folder),
        "torch bfloat16": functools.partial(torch_candidate, folder, "bfloat16"),
        "CTranslate2 int8": functools.partial(ctranslate2_candidate, folder),
    }
    if piece == "load":
        candidates = {
            "Keras export": functools.partial(keras_export_candidate, folder / "keras"),
            **{name: make for name, make in candidates.items() if name in VARIANTS},
        }
    if options.only:
        candidates = {name: make for name, make in candidates.items() if any(part in name for part in options.only)}
    found: dict = {"conditions": conditions}
    if piece == "load":
        rounds = [{name: in_process(loading, make) for name, make in candidates.items()} for _ in range(3)]
        found["models"] = {
            name: {key: float(np.median([one[name][key] for one in rounds])) for key in rounds[0][name]}
            for name in candidates
        }
        return found
    batch, prompt, count = 2, (512, 512), 2
    if piece != "prefill":
        batch, prompt, count = int(piece), options.prompt, options.new_tokens
    ids, lengths = bench.prompts(batch, *prompt, VOCABULARY)
    apart = {}
    try:
        for name, make in candidates.items():
            apart[name] = Apart(make)
            apart[name](ids, lengths, 1)  # with the answers that `measure` compares this is the warm-up
        found |= {"batch": batch, "prompt": list(prompt), "new_tokens": count}
        found["models"] = bench.measure(apart, ids, lengths, count, repeats=options.repeats, warmup=0)
        for name, process in apart.items():
            found["models"][name]["peak_memory_mb"] = process.peak_memory_mb()
    finally:
        for process in apart.values():
            process.stop()
    found["bytes_per_second"] = in_process(memory_bandwidth)
    with np.load(folder / "weights.npz") as weights:
        found["parameters"] = int(sum(weights[name].size for name in weights.files))
    return found


def table(found: dict) -> str:
    """All pieces as text."""
    lines = []
    for piece in PIECES + tuple(name for name in found if name not in PIECES):
        if piece not in found:
            continue
        content, models = found[piece], found[piece]["models"]
        conditions = content["conditions"]
        machine = conditions["machine"]
        where = f"{machine['cores']} cores {machine['cpu']}"
        lines.append(f"{piece}: {conditions['date']}, commit {conditions['commit']}, {where}")
        if piece == "load":
            cells = [[name, *(f"{entry[key]:.2f}" for key in entry)] for name, entry in models.items()]
            lines += [results.text_table(["candidate", *next(iter(models.values()))], cells), ""]
            continue
        if piece == "prefill":
            base = models[BASE]["first_token_ms"]["median"]
            cells = []
            for name, entry in models.items():
                first = entry["first_token_ms"]["median"]
                cells.append([name, f"{first:.0f}", f"{base / first:.2f}", f"{entry['peak_memory_mb']:.0f}"])
            headers = [f"{content['batch']} prompts of {content['prompt'][0]}", "first ms", "ratio", "peak MB"]
            lines += [results.text_table(headers, cells), ""]
            continue
        lines.append(bench.table([content]))
        steps = content["bytes_per_second"] / content["parameters"]
        limits = ", ".join(f"{content['batch'] * steps / size:.0f} in {name}" for name, size in SIZES.items())
        lines.append(f"bandwidth {content['bytes_per_second'] / 1e9:.0f} GB/s: at most {limits} tokens/s")
        for name in models:
            wanted = WANTED.get(name.removesuffix(" onednn").removesuffix(" portable"), {})
            if BASE in models and content["batch"] in wanted:
                ratio = models[name]["tokens_per_second"] / models[BASE]["tokens_per_second"]
                verdict = "reached" if ratio >= wanted[content["batch"]] else "missed"
                lines.append(f"{name}: {ratio:.2f} times keras-nlp, wanted {wanted[content['batch']]} ({verdict})")
        lines.append("")
    return "\n".join(lines)


SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}


# Processes ------------------------------------------------------------------------------------------------------------


class Apart:
    """A candidate in a process of its own: made there by `make()`, called from here."""

    def __init__(self, make):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def __call__(self, ids, lengths, count):
        self._pipe.send((ids, lengths, count))
        return self._receive()

    def peak_memory_mb(self) -> float:
        self._pipe.send("memory")
        return self._receive()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def _receive(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a candidate's process has ended; its own message is above") from None
        return answer


def _answer(pipe, make) -> None:
    call = make()
    pipe.send("ready")
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(peak_memory_mb() if request == "memory" else call(*request))


def in_process(function, *arguments):
    """function(*arguments), computed in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory_mb() -> float:
    return results.peak_memory_bytes() / 2**20


def memory_bandwidth() -> float:
    """Bytes per second that a maximum over a large array reads, with as many threads as TensorFlow uses."""
    import tensorflow as tf

    array = tf.zeros([1 << 26])
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        tf.reduce_max(array).numpy()
        best = max(best, (1 << 28) / (time.perf_counter() - began))
    return best


def loading(make) -> dict[str, float]:
    """Seconds until a SavedModel is loaded and until its first answer, and the memory that took."""
    import tensorflow as tf

    tf.constant(0.0).numpy()
    before = peak_memory_mb()
    began = time.perf_counter()
    call = make()
    loaded = time.perf_counter()
    call(*bench.prompts(1, 16, 16, VOCABULARY), 1)
    answered = time.perf_counter()
    return {
        "load_seconds": loaded - began,
        "first_answer_seconds": answered - loaded,
        "added_peak_memory_mb": peak_memory_mb() - before,
    }


# Models ---------------------------------------------------------------------------------------------------------------


def keras_model(layers: int):
    """The model itself; every process that makes it makes the same weights."""
    import keras
    import keras_nlp

    keras.utils.set_random_seed(0)
    backbone = keras_nlp.models.GPT2Backbone(VOCABULARY, layers, HEADS, WIDTH, INNER, max_sequence_length=POSITIONS)
    return keras_nlp.models.GPT2CausalLM(backbone)


def make_models(folder: Path, layers: int) -> None:
    """Writes the exports of tfvllm and Keras, CTranslate2's model, and the weights for torch."""
    import tfvllm
    from tfvllm.models import read

    folder.mkdir(parents=True, exist_ok=True)
    model = keras_model(layers)
    for name, settings in VARIANTS.items():
        path = folder / name.replace(" ", "_")
        tfvllm.export(model, path, task="generate", warmup=False, check=None, **settings)
    model.export(str(folder / "keras"), verbose=False)
    spec = read(model)
    weights = {"embedding": spec.embedding, "positions": spec.decoder.position_table}

    def norm(name, value):
        weights[f"{name}.scale"], weights[f"{name}.offset"] = value.scale, value.offset

    def linear(name, value):  # [outputs, inputs], as torch and CTranslate2 want it
        weights[f"{name}.weight"], weights[f"{name}.bias"] = np.ascontiguousarray(value.kernel.T), value.bias

    for index, block in enumerate(spec.decoder.blocks):
        norm(f"{index}.norm1", block.attention_norm)
        linear(f"{index}.qkv", block.attention.query_key_value)
        linear(f"{index}.out", block.attention.output)
        norm(f"{index}.norm2", block.feed_forward_norm)
        linear(f"{index}.up", block.feed_forward.up)
        linear(f"{index}.down", block.feed_forward.output)
    norm("final", spec.decoder.final_norm)
    np.savez(folder / "weights.npz", **weights)


def load_weights(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """All arrays by name, and the number of blocks."""
    with np.load(folder / "weights.npz") as file:
        weights = {name: file[name] for name in file.files}
    return weights, sum(name.endswith(".qkv.weight") for name in weights)


def make_ctranslate2(folder: Path) -> None:
    """The same weights as a CTranslate2 model, quantised to int8 by CTranslate2 itself."""
    try:
        from ctranslate2.specs import common_spec, transformer_spec
    except ImportError as error:
        print(f"CTranslate2: left out ({error})")
        return
    weights, layers = load_weights(folder)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers, HEADS, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )

    def norm(target, name):
        target.gamma, target.beta = weights[f"{name}.scale"], weights[f"{name}.offset"]

    def linear(target, name):
        target.weight, target.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["embedding"]
    decoder.position_encodings.encodings = weights["positions"]
    norm(decoder.layer_norm, "final")
    decoder.projection.weight = weights["embedding"]
    for index, target in enumerate(decoder.layer):
        norm(target.self_attention.layer_norm, f"{index}.norm1")
        linear(target.self_attention.linear[0], f"{index}.qkv")
        linear(target.self_attention.linear[1], f"{index}.out")
        norm(target.ffn.layer_norm, f"{index}.norm2")
        linear(target.ffn.linear_0, f"{index}.up")
        linear(target.ffn.linear_1, f"{index}.down")
    spec.register_vocabulary([f"t{i}" for i in range(VOCABULARY)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "t0"
    spec.validate()
    spec.optimize(quantization="int8")
    (folder / "ctranslate2").mkdir()
    spec.save(str(folder / "ctranslate2"))


# Candidates: made in their own process --------------------------------------------------------------------------------


def keras_candidate(folder: Path):
    return bench.keras_model(keras_model(load_weights(folder)[1]))


def saved_candidate(path: Path):
    return bench.saved_model(path)


def keras_export_candidate(path: Path):
    """What `model.export` of Keras gives: one forward pass, no generation. Only its loading is measured."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    function = loaded.signatures["serving_default"]

    def call(ids, lengths, count):
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        inputs = {"token_ids": ids, "padding_mask": mask}
        specs = function.structured_input_signature[1]
        return [
            value.numpy()
            for value in function(**{k: tf.cast(inputs[k], spec.dtype) for k, spec in specs.items()}).values()
        ]

    call.loaded = loaded
    return call


def torch_candidate(folder: Path, dtype: str = "float32"):
    """The same weights in plain torch: a cache for each block, merged QKV, one step at a time."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count() or 1)
    kind = getattr(torch, dtype)
    weights, layers = load_weights(folder)
    held = {name: torch.from_numpy(array).to(kind) for name, array in weights.items()}
    del weights

    def norm(x, name):
        return functional.layer_norm(x, (WIDTH,), held[f"{name}.scale"], held[f"{name}.offset"], eps=1e-5)

    def linear(x, name):
        return functional.linear(x, held[f"{name}.weight"], held[f"{name}.bias"])

    def forward(ids, places, caches, mask, seen):
        """ids [rows, length] at places [rows, length]; attends to the first `seen` positions of the caches."""
        rows, length = ids.shape
        x = held["embedding"][ids] + held["positions"][places]
        for index, (keys, values) in enumerate(caches):
            q, k, v = linear(norm(x, f"{index}.norm1"), f"{index}.qkv").view(rows, length, 3, HEADS, -1).unbind(2)
            keys[torch.arange(rows)[:, None], :, places] = k
            values[torch.arange(rows)[:, None], :, places] = v
            a = functional.scaled_dot_product_attention(
                q.transpose(1, 2), keys[:, :, :seen], values[:, :, :seen], attn_mask=mask
            )
            x = x + linear(a.transpose(1, 2).reshape(rows, length, WIDTH), f"{index}.out")
            up = functional.gelu(linear(norm(x, f"{index}.norm2"), f"{index}.up"), approximate="tanh")
            x = x + linear(up, f"{index}.down")
        return x

    def choose(x):
        return functional.linear(norm(x, "final"), held["embedding"]).argmax(-1)

    @torch.inference_mode()
    def call(ids, lengths, count):
        rows, longest = ids.shape
        lengths = torch.from_numpy(lengths).long()
        shape = rows, HEADS, longest + count, WIDTH // HEADS
        caches = [(torch.zeros(shape, dtype=kind), torch.zeros(shape, dtype=kind)) for _ in range(layers)]
        places = torch.arange(longest).expand(rows, longest)
        mask = (torch.arange(longest)[None, :] <= torch.arange(longest)[:, None])[None, None]
        x = forward(torch.from_numpy(ids).long(), places, caches, mask, longest)
        token = choose(x[torch.arange(rows), lengths - 1])
        found = [token]
        for step in range(count - 1):
            place = (lengths + step)[:, None]
            seen = longest + step + 1
            mask = (torch.arange(seen)[None, :] <= place)[:, None, None]
            token = choose(forward(token[:, None], place, caches, mask, seen)[:, 0])
            found.append(token)
        return torch.stack(found, dim=1).numpy().astype(np.int32)

    return call


def ctranslate2_candidate(folder: Path):
    import ctranslate2

    generator = ctranslate2.Generator(str(folder / "ctranslate2"), intra_threads=os.cpu_count() or 1)

    def call(ids, lengths, count):
        starts = [[f"t{i}" for i in row[:length]] for row, length in zip(ids, lengths)]
        found = generator.generate_batch(
            starts, max_length=count, min_length=count, sampling_topk=1, include_prompt_in_result=False
        )
        return np.array([answer.sequences_ids[0][:count] for answer in found], np.int32)

    return call


if __name__ == "__main__":
    main()
