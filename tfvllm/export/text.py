"""Text in front of an encoder: a keras-nlp preprocessor as plain TensorFlow and TensorFlow Text ops.

Text is tokenised inside the graph and padded to the longest row of the batch, not to a fixed length: a short request
pays for its own tokens only. Where the answers of the graph that is served depend on the padded length (FNet mixes
padding into every position, RoFormer V2 attends to it), the export keeps the fixed length and says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.families.relative_positions import exact_positions
from tfvllm.generation.text import byte_pair_codec
from tfvllm.models import tokenizer as tokenizers
from tfvllm.savedmodel import write

# What every text export is compared on: short, long, empty, accented, Chinese, punctuation, a zero byte. A text as
# long as the model takes comes on top.
PROBES = (
    "a fine and moving film",
    "no",
    "",
    "It is not that the plot fails; it is that nobody, least of all the director, seems to have cared whether it did. "
    * 3,
    "很好的酒店，服务周到，下次还来！",
    "café déjà vu — naïve?! ¯\\_(ツ)_/¯",
    "tab\tand\nline\x00zero",
)
SENTENCE = "the film was not as bad as everyone said it would be and I liked it a lot"
NAMES = ("text", "text_pair")

Answer = Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]


class TextFeatures:
    """A preprocessor's features of one text a row, or of a pair of texts.

    `own(*texts)` is the model's own preprocessing at `max_length`; `serve` gives the function to be stored, padded to
    the longest row of the batch where that leaves the answers as they are.

    Args:
        model: what reads the features.
        preprocessor: a keras-nlp text preprocessor.
        max_length: tokens kept of each row, special tokens included; default the preprocessor's sequence length.
        texts: 1, or 2 for a model that was trained on pairs.
        tokenizer: settings of the tokenizer, or "as is"; default those of the folder it was read from.
    """

    def __init__(
        self,
        model,
        preprocessor,
        max_length: int | None = None,
        *,
        texts: int = 1,
        tokenizer: str | Mapping[str, bool] | None = None,
    ):
        if isinstance(texts, bool) or texts not in (1, 2):
            raise InputError(f"texts must be 1, or 2 for a model that was trained on pairs of texts; got {texts!r}.")
        self._model = model
        self.preprocessor = preprocessor
        self.names = NAMES[:texts]
        max_length = max_length or getattr(preprocessor, "sequence_length", None)
        if max_length is None:
            raise InputError(
                f"{type(preprocessor).__name__} has no sequence_length; expected a text classifier's preprocessor. "
                "Pass max_length=..., or export the model without its preprocessor."
            )
        self.max_length = int(max_length)
        limit = getattr(getattr(model, "backbone", model), "max_sequence_length", None)
        if limit is not None and self.max_length > limit:
            raise InputError(
                f"max_length is {self.max_length}, but the model has positions for {limit} tokens. "
                f"Pass max_length={limit} or less."
            )
        self._settled = tokenizers.settle(preprocessor.tokenizer, tokenizer)
        if preprocessor.packer is None:
            preprocessor.build(None)
        self.packer = preprocessor.packer
        # keras-nlp's byte-pair tokenizer keeps each word it has met in a mutable table, which would grow with every
        # request of a server; the codec gives the same tokens from static tables.
        self._codec = byte_pair_codec(preprocessor.tokenizer)
        self._tokenize = preprocessor.tokenizer if self._codec is None else self._codec.encode
        made = None if hasattr(preprocessor, "generate_preprocess") else preprocessor(["a"])
        if not isinstance(made, Mapping):
            raise InputError(
                f"{type(preprocessor).__name__} makes inputs with labels, to train a language model on; expected "
                "one that makes the features of a text. Pass preprocessor=… of a classifier or an embedder, or export "
                "model.backbone, which takes ids."
            )
        self.keys = sorted(made)
        unknown = set(self.keys) - {"token_ids", "padding_mask", "segment_ids"}
        if unknown:
            raise InputError(
                f"{type(preprocessor).__name__} makes {', '.join(sorted(unknown))}, unknown to the export; "
                "expected token_ids, padding_mask and segment_ids. Export the model without its preprocessor."
            )
        self.padding: dict[str, Any] = {"to": "max_length", "length": self.max_length}
        start, sep, end = (list(value or ()) for value in self._ends())
        special = len(start) + len(end) + (texts - 1) * len(sep)
        if self.max_length <= special:
            raise InputError(f"max_length is {self.max_length}, but {special} tokens of it are special. Pass more.")

    def _ends(self):
        return self.packer.start_value, getattr(self.packer, "sep_value", None), self.packer.end_value

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """The inputs of the signature."""
        return [tf.TensorSpec([None], tf.string, name=name) for name in self.names]

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """Rows to compare on, by input: short, long and empty ones in every company."""
        rows = [*PROBES, " ".join([SENTENCE] * math.ceil(self.max_length / len(SENTENCE.split())))]
        if len(self.names) == 1:
            return {"text": as_bytes(rows)}
        return {"text": as_bytes([*rows, rows[-1]]), "text_pair": as_bytes([*rows[3:], *rows[:3], rows[-1]])}

    def entries(self) -> dict[str, Any]:
        """What the manifest says of the text."""
        return {
            "texts": len(self.names),
            "max_length": self.max_length,
            "padding": self.padding,
            "tokenizer": self._settled.entry,
            "notes": self._settled.notes,
        }

    def held_by(self, model) -> tf.Module:
        """A module that owns what the graph of `model` behind these features reads, for `savedmodel.save`."""
        if self._codec is None:
            return write.weights_module(model, self.preprocessor, self.preprocessor.tokenizer)
        module = write.weights_module(model)
        unused = {id(table) for table in write.resources(self.preprocessor, self.preprocessor.tokenizer)}
        module.resources = [table for table in module.resources if id(table) not in unused]
        module.codec = self._codec
        return module

    def serve(
        self, answer: Answer, expected: Mapping[str, np.ndarray], tolerance: Mapping[str, float], multiple: int = 1
    ) -> Any:
        """`answer` behind the features as a tf.function of strings, traced as it will be stored.

        It pads to the longest row, rounded up to `multiple`, if each probe alone and all together then give
        `expected`, to `tolerance` (`atol`, `rtol`); else to `max_length`.
        """

        def to_longest(*texts):
            with exact_positions(self._model, self.max_length):
                return answer(self.dynamic(*texts, multiple=multiple))

        def to_max_length(*texts):
            with exact_positions(self._model, self.max_length):
                return answer(self.fixed(*texts))

        dynamic, fixed = (tf.function(call, input_signature=self.specs) for call in (to_longest, to_max_length))
        probes = list(self.probes.values())
        rows = len(probes[0])
        worst, within = 0.0, True
        try:
            for chosen in [slice(i, i + 1) for i in range(rows)] + [slice(rows)]:
                found = dynamic(*(tf.constant(probe[chosen]) for probe in probes))
                for name, value in expected.items():
                    errors = np.abs(found[name].numpy() - value[chosen])
                    allowed = tolerance["atol"] + tolerance["rtol"] * np.abs(value[chosen])
                    within = within and bool(np.all(errors <= allowed))  # of NaN: no
                    worst = max(worst, float(np.max(errors, initial=0.0)))
        except Exception as error:
            self.padding["reason"] = f"the model does not take other lengths: {type(error).__name__}"
            return fixed
        if not within:
            self.padding["reason"] = f"the answers depend on the padded length (by {worst:.2g})"
            return fixed
        self.padding = {"to": "longest", "up_to": self.max_length, "multiple": multiple, "error": worst}
        return dynamic

    def own(self, *texts) -> dict[str, tf.Tensor]:
        """The model's own preprocessor, run as in a tf.data pipeline, at `max_length`.

        A byte-pair tokenizer is asked for plain lists instead: in a pipeline it gives -1, which no model takes, for
        what its vocabulary lacks, and leaves it out (as the export does) otherwise. Both graphs end a text at a zero
        byte.
        """
        preprocessor, length = self.preprocessor, self.preprocessor.sequence_length
        preprocessor.sequence_length = self.max_length
        texts = tuple(tf.constant(text) for text in texts)
        try:
            if self._codec is not None:
                texts = tuple([row.decode().split("\0")[0] for row in text.numpy()] for text in texts)
                return preprocessor(x=texts if len(texts) > 1 else texts[0])
            # By name: of a lone tuple of two, the second would be taken for the labels.
            run = tf.function(lambda *x: preprocessor(x=x if len(x) > 1 else x[0]), autograph=False)
            return run(*texts)
        finally:
            preprocessor.sequence_length = length

    def fixed(self, *texts) -> dict[str, tf.Tensor]:
        """The same features as `own`, padded to `max_length`, which the graph then knows."""
        features = self._pack(texts, tf.constant(self.max_length, tf.int64))
        return {key: tf.ensure_shape(value, [None, self.max_length]) for key, value in features.items()}

    def dynamic(self, *texts, multiple: int = 1) -> dict[str, tf.Tensor]:
        """The same, padded to the longest row rounded up to `multiple`, at most `max_length`."""
        return self._pack(texts, multiple)

    def with_mask(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """`features` and, where the preprocessor makes none, which of the tokens are real."""
        return {"padding_mask": tf.not_equal(features["token_ids"], self.packer.pad_value or 0), **features}

    @tf.function  # in a graph the tokenizer gives ragged tensors, eagerly lists
    def _pack(self, texts: Sequence[tf.Tensor], length) -> dict[str, tf.Tensor]:
        rows = [self._rows(text) for text in texts]
        ids, segments = self._one(rows[0], length) if len(rows) == 1 else self._pair(rows, length)
        pad = self.packer.pad_value or 0
        values = {"token_ids": ids, "padding_mask": ids != pad, "segment_ids": segments}
        return {key: values[key] for key in self.keys}

    def _rows(self, text) -> tf.RaggedTensor:
        tokens = self._tokenize(text)
        if not isinstance(tokens, tf.RaggedTensor):
            raise InputError(
                "the tokenizer pads its rows (its sequence_length is set); expected ragged rows. "
                "Make the tokenizer without sequence_length."
            )
        return tokens

    def _one(self, tokens: tf.RaggedTensor, length) -> tuple[tf.Tensor, tf.Tensor]:
        # Same as MultiSegmentPacker for one segment: both of its truncation rules then keep the first tokens. Few ops,
        # for a short text costs little more than its ops: rows are padded and cut in one, and the end tokens written
        # over what stands behind each row.
        start, _, end = (list(value or ()) for value in self._ends())
        pad = self.packer.pad_value or 0
        splits = tokens.row_splits
        counts = tf.minimum(splits[1:] - splits[:-1], self.max_length - len(start) - len(end))
        rows = tf.size(counts, tf.int64)
        if isinstance(length, int):
            longest = tf.maximum(tf.reduce_max(counts) + (len(start) + len(end)), 1)  # of no rows the least int64
            length = tf.minimum(longest if length == 1 else -(-longest // length) * length, self.max_length)
        ids = tokens.to_tensor(default_value=pad, shape=tf.stack([rows, length - len(start)]))
        if start:
            ids = tf.concat([tf.fill([rows, 1], tf.constant(value, ids.dtype)) for value in start] + [ids], axis=1)
        places = tf.range(length)
        for i, value in enumerate(end):
            here = places == (counts + (len(start) + i))[:, tf.newaxis]
            ids = tf.where(here, tf.constant(value, ids.dtype), ids)
        ids.set_shape([None, None])
        return ids, tf.zeros_like(ids)

    def _pair(self, tokens: Sequence[tf.RaggedTensor], length) -> tuple[tf.Tensor, tf.Tensor]:
        # The preprocessor's own packer cuts and joins the two; what every row of the batch pads with is cut off.
        ids, segments = self.packer(tuple(tokens), sequence_length=self.max_length)
        if isinstance(length, int):
            start, sep, end = (list(value or ()) for value in self._ends())
            counts = tf.add_n([t.row_splits[1:] - t.row_splits[:-1] for t in tokens])
            longest = tf.maximum(tf.reduce_max(counts) + (len(start) + len(sep) + len(end)), 1)
            length = tf.minimum(longest if length == 1 else -(-longest // length) * length, self.max_length)
        ids, segments = ids[:, :length], tf.cast(segments, ids.dtype)[:, :length]
        ids.set_shape([None, None])
        segments.set_shape([None, None])
        return ids, segments


def as_bytes(rows: Sequence[str]) -> np.ndarray:
    """Strings as the array of bytes that a signature takes."""
    return np.array([row.encode() for row in rows], object)
