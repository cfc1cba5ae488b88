"""Generation at GPT-2's 124M shape, random weights, mixed prompt lengths: tfvllm against keras-nlp, torch, CTranslate2.

    python benchmarks/generate.py --out generate.json

All candidates take turns in one process on the same weights and prompts, greedy. Rows need `new_tokens` tokens each;
keras-nlp fills every row up to the longest prompt plus that many, which is how it generates. The bandwidth limit
beside the figures is the speed at which all weights could be read once for each step.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_nlp
import numpy as np

import tfvllm
from tfvllm.bench import generate as bench
from tfvllm.bench import results

VOCABULARY, LAYERS, HEADS, WIDTH, INNER, POSITIONS = 50257, 12, 12, 768, 3072, 1024
# tokens/s over keras-nlp float32 that the project wants at batch 1, 8, 32
WANTED = {"tfvllm float32": {1: 1.3, 8: 2.2, 32: 3.0}, "tfvllm bfloat16": {1: 2.2, 8: 3.5, 32: 5.5}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 64])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick look")
    parser.add_argument("--no-prefill", action="store_true", help="leave out the prefill of 512 tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    backbone = keras_nlp.models.GPT2Backbone(
        VOCABULARY, options.layers, HEADS, WIDTH, INNER, max_sequence_length=POSITIONS
    )
    model = keras_nlp.models.GPT2CausalLM(backbone)
    candidates = {"keras-nlp float32": bench.keras_model(model)}
    with tempfile.TemporaryDirectory() as folder:
        loading = {}
        for name, settings in {
            "tfvllm float32": {},
            "tfvllm float32 onednn": {"target": "onednn"},
            "tfvllm bfloat16": {"precision": "bfloat16"},
        }.items():
            path = tfvllm.export(
                model, Path(folder) / name.replace(" ", "_"), task="generate", warmup=False, check=None, **settings
            )
            began = time.perf_counter()
            candidates[name] = bench.saved_model(path)
            loading[name] = time.perf_counter() - began
        for name, make in (("torch float32", torch_model), ("CTranslate2 int8", ctranslate2_model)):
            try:
                candidates[name] = make(model, options.layers, Path(folder))
            except ImportError as error:
                print(f"{name}: left out ({error})")
        rows = []
        for batch in options.batches:
            ids, lengths = bench.prompts(batch, *options.prompt, VOCABULARY)
            found = bench.measure(candidates, ids, lengths, options.new_tokens, repeats=options.repeats)
            rows.append({"batch": batch, "prompt": options.prompt, "new_tokens": options.new_tokens, "models": found})
            print(bench.table(rows[-1:]), flush=True)
        prefill = None
        if not options.no_prefill:
            ids, lengths = bench.prompts(2, 512, 512, VOCABULARY)
            prefill = bench.measure(candidates, ids, lengths, 2, repeats=options.repeats)
            for name, entry in prefill.items():
                print(f"prefill of 2 x 512: {name} {entry['first_token_ms']['median']:.0f} ms")
    weights = model.count_params()
    bandwidth = memory_bandwidth()
    limits = {name: bandwidth / (weights * size) for name, size in (("float32", 4), ("bfloat16", 2), ("int8", 1))}
    print(f"bandwidth {bandwidth / 1e9:.0f} GB/s: at most {limits['float32']:.0f} steps/s in float32, ", end="")
    print(f"{limits['bfloat16']:.0f} in bfloat16, {limits['int8']:.0f} in int8")
    print("load:", {name: f"{seconds:.1f} s" for name, seconds in loading.items()})
    for row in rows:
        base = row["models"]["keras-nlp float32"]["tokens_per_second"]
        for name, wanted in WANTED.items():
            if row["batch"] in wanted:
                ratio = row["models"][name]["tokens_per_second"] / base
                verdict = "reached" if ratio >= wanted[row["batch"]] else "missed"
                line = f"batch {row['batch']} {name}: {ratio:.2f} times keras-nlp"
                print(f"{line}, wanted {wanted[row['batch']]} ({verdict})")
    if options.out:
        content = {"rows": rows, "prefill": prefill, "bandwidth_bytes_per_second": bandwidth, "load_seconds": loading}
        results.write_json(options.out, "generate, GPT-2 124M shape, random weights", content)


def memory_bandwidth() -> float:
    """Bytes per second that a sum over a large array reads, with as many threads as TensorFlow uses."""
    import tensorflow as tf

    array = tf.ones([1 << 28], tf.int8)
    array = tf.bitcast(tf.reshape(array, [-1, 4]), tf.float32)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        tf.reduce_max(array).numpy()
        best = max(best, (1 << 28) / (time.perf_counter() - began))
    return best


def torch_model(model, layers: int, folder: Path):
    """The same weights in plain torch: a cache per layer, fused QKV, one step at a time."""
    import torch
    from torch.nn import functional

    from tfvllm.generation.families import read

    spec = read(model)

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array))

    blocks = [
        {
            "norm1": (tensor(b.attention_norm.scale), tensor(b.attention_norm.offset)),
            "qkv": (tensor(b.attention.query_key_value.kernel.T), tensor(b.attention.query_key_value.bias)),
            "out": (tensor(b.attention.output.kernel.T), tensor(b.attention.output.bias)),
            "norm2": (tensor(b.feed_forward_norm.scale), tensor(b.feed_forward_norm.offset)),
            "up": (tensor(b.feed_forward.up.kernel.T), tensor(b.feed_forward.up.bias)),
            "down": (tensor(b.feed_forward.output.kernel.T), tensor(b.feed_forward.output.bias)),
        }
        for b in spec.decoder.blocks
    ]
    embedding, positions = tensor(spec.embedding), tensor(spec.decoder.position_table)
    final = tensor(spec.decoder.final_norm.scale), tensor(spec.decoder.final_norm.offset)

    def forward(ids, places, caches, mask, written):
        rows, length = ids.shape
        x = embedding[ids] + positions[places]
        for block, (keys, values) in zip(blocks, caches):
            n = functional.layer_norm(x, (WIDTH,), *block["norm1"], eps=1e-5)
            q, k, v = functional.linear(n, *block["qkv"]).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            keys[torch.arange(rows)[:, None], :, written] = k.transpose(1, 2)
            values[torch.arange(rows)[:, None], :, written] = v.transpose(1, 2)
            a = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + functional.linear(a.transpose(1, 2).reshape(rows, length, WIDTH), *block["out"])
            n = functional.layer_norm(x, (WIDTH,), *block["norm2"], eps=1e-5)
            n = functional.gelu(functional.linear(n, *block["up"]), approximate="tanh")
            x = x + functional.linear(n, *block["down"])
        return functional.layer_norm(x, (WIDTH,), *final, eps=1e-5)

    @torch.inference_mode()
    def call(ids, lengths, count):
        rows, longest = ids.shape
        capacity = longest + count
        lengths = torch.from_numpy(lengths).long()
        caches = [
            (torch.zeros(rows, HEADS, capacity, WIDTH // HEADS), torch.zeros(rows, HEADS, capacity, WIDTH // HEADS))
            for _ in blocks
        ]
        places = torch.arange(longest).expand(rows, longest)
        mask = (torch.arange(capacity)[None, :] <= torch.arange(longest)[:, None])[None, None]
        x = forward(torch.from_numpy(ids).long(), places, caches, mask, places)
        token = (x[torch.arange(rows), lengths - 1] @ embedding.T).argmax(-1)
        found = [token]
        for step in range(count - 1):
            place = (lengths + step)[:, None]
            mask = (torch.arange(capacity)[None, :] <= place)[:, None, None]
            x = forward(token[:, None], place, caches, mask, place)
            token = (x[:, 0] @ embedding.T).argmax(-1)
            found.append(token)
        return torch.stack(found, dim=1).numpy().astype(np.int32)

    return call


def ctranslate2_model(model, layers: int, folder: Path):
    """The same weights in CTranslate2, quantised to int8 by CTranslate2 itself."""
    import ctranslate2
    from ctranslate2.specs import common_spec, transformer_spec

    from tfvllm.generation.families import read

    source = read(model)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers, HEADS, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )

    def norm(target, value):
        target.gamma, target.beta = value.scale, value.offset

    def linear(target, value):
        target.weight, target.bias = np.ascontiguousarray(value.kernel.T), value.bias

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = source.embedding
    decoder.position_encodings.encodings = source.decoder.position_table
    norm(decoder.layer_norm, source.decoder.final_norm)
    decoder.projection.weight = source.embedding
    for target, block in zip(decoder.layer, source.decoder.blocks):
        norm(target.self_attention.layer_norm, block.attention_norm)
        linear(target.self_attention.linear[0], block.attention.query_key_value)
        linear(target.self_attention.linear[1], block.attention.output)
        norm(target.ffn.layer_norm, block.feed_forward_norm)
        linear(target.ffn.linear_0, block.feed_forward.up)
        linear(target.ffn.linear_1, block.feed_forward.output)
    words = [f"t{i}" for i in range(VOCABULARY)]
    spec.register_vocabulary(words)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[0]
    spec.validate()
    spec.optimize(quantization="int8")
    path = folder / "ctranslate2"
    path.mkdir()
    spec.save(str(path))
    generator = ctranslate2.Generator(str(path), intra_threads=os.cpu_count() or 1)

    def call(ids, lengths, count):
        starts = [[words[i] for i in row[:length]] for row, length in zip(ids, lengths)]
        found = generator.generate_batch(
            starts, max_length=count, min_length=count, sampling_topk=1, include_prompt_in_result=False
        )
        return np.array([answer.sequences_ids[0][:count] for answer in found], np.int32)

    return call


if __name__ == "__main__":
    main()
