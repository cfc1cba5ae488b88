"""A Keras language model that writes by tfvllm's own loop without being exported: rows of tokens, or texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.export import general, generate, translate
from tfvllm.families import has_reader, read, unread
from tfvllm.generation import loop
from tfvllm.generation.generator import Generator
from tfvllm.generation.model_generator import ModelGenerator, ModelTranslator, positions_of, refuse_more_than_text
from tfvllm.generation.model_step import input_names
from tfvllm.generation.sampling import SamplingParams
from tfvllm.generation.text import valid_utf8
from tfvllm.generation.translator import Translator


class Rollouts:
    """Continues rows of tokens as a model would with the weights it has at that moment.

    A call costs the loop and, for a family with a reader, a copy of the weights; nothing is traced anew. A family
    without one goes the general path, by the model's own step. What is drawn depends on the seed, the weights and the
    rows alone.

    Args:
        model: a keras-nlp `CausalLM` or `Seq2SeqLM`, such as the student that is being trained.
        temperature: 1 samples from the model's own distribution, 0 takes the most probable token.
        top_k: only the k most probable tokens; 0: all.
        top_p: only the fewest tokens that together reach this share of the probability; 1: all.
        stop_token_ids: tokens that end a row; default the tokenizer's end tokens, without a preprocessor none.
        pad_token_id: fills rows; default the tokenizer's, without a preprocessor 0.
    Raises:
        InputError: a model that cannot be generated from, or settings that make no sense.

    Example:
        >>> backbone = keras_nlp.models.GPT2Backbone(50, 1, 2, 8, 16, max_sequence_length=6)
        >>> write = tfvllm.rollouts.Rollouts(keras_nlp.models.GPT2CausalLM(backbone))
        >>> rows, known = write({"token_ids": ids, "padding_mask": np.arange(6) + 0 * ids < 2}, seed=1)
        >>> rows.shape, bool((rows[:, :2] == ids[:, :2]).all()), bool(known.all())
        ((16, 6), True, True)
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_token_ids: Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ):
        SamplingParams(temperature, top_k, top_p)  # refuses what makes no sense
        self.model = model
        self.controls = tf.constant(temperature, tf.float32), tf.constant(top_k), tf.constant(top_p, tf.float32)
        tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
        if stop_token_ids is None:
            stop_token_ids = [] if tokenizer is None else generate.end_token_ids(tokenizer)
        if pad_token_id is None:
            pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0
        self._options: dict[str, Any] = {
            "start_ids": (int(pad_token_id),),  # rows bring their own; what a general step is tried with
            "stop_ids": tuple(int(token) for token in stop_token_ids),
            "pad_id": int(pad_token_id),
        }
        self._kind = "Seq2SeqLM" if _reads_two(model) else "CausalLM"
        if not has_reader(model):
            refuse_more_than_text(model, self._kind)
        self._engine: Any = None  # made of the first rows
        self._length = 0  # of these
        self._run: Any = None

    def __call__(self, features: Mapping[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that go on from what they hold.

        Args:
            features: token_ids and padding_mask int[batch, length]: the tokens of a row first, then room for what is
                written. For a `Seq2SeqLM` those with `decoder_` before them, beside the source's with `encoder_`.
            seed: of the draws.
        Returns:
            (token ids int32[batch, length], padding mask bool of that shape). Rows end with an end token or are full.
            A row without tokens, and one of several tokens that ends with an end token already, stay as they are.
        """
        sides = ("decoder_", "encoder_") if self._kind == "Seq2SeqLM" else ("",)
        rows = [
            tensor
            for side in sides
            for tensor in (
                tf.cast(features[f"{side}token_ids"], tf.int32),
                tf.cast(features[f"{side}padding_mask"], tf.bool),
            )
        ]
        self._settle(int(rows[0].shape[1]))
        ids, known = self._run(*rows, tf.constant(seed, tf.int32), *self.controls)
        return ids.numpy(), known.numpy()

    def _settle(self, length: int) -> None:
        """The engine, with the model's present weights."""
        engine, two = self._engine, self._kind == "Seq2SeqLM"
        if has_reader(self.model):
            spec = read(self.model, self._kind)
            if engine is not None:
                engine.network.assign(spec)
                return
            engine = (Translator if two else Generator)(spec, **self._options)
        else:
            if engine is not None and (length == self._length or (length < self._length and not engine.fixed)):
                return
            kind: Any = ModelTranslator if two else ModelGenerator
            engine = general.by_own_step(kind, self.model, {**self._options, "max_length": length})
        self._engine, self._length, self._run = engine, length, self._traced(engine)

    def _traced(self, engine: Any) -> Any:
        ids, mask, number = tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.bool), tf.float32
        settings = [tf.TensorSpec([], dtype) for dtype in (tf.int32, number, tf.int32, number)]
        sources = [ids, mask] if self._kind == "Seq2SeqLM" else []
        stop_ids, pad_id = self._options["stop_ids"], self._options["pad_id"]

        def run(ids, mask, *rest):
            source, (seed, temperature, top_k, top_p) = rest[:-4], rest[-4:]
            controls = SamplingParams(temperature, top_k, top_p, seed=seed)
            ids, lengths = loop.left_aligned(ids, mask)
            total = tf.shape(ids)[1]
            last = tf.gather(ids, tf.maximum(lengths - 1, 0), batch_dims=1)
            over = (lengths > 1) & loop.is_one_of(last, stop_ids)
            asked = tf.where(over, 0, lengths)
            shortest = tf.reduce_min(tf.where(asked > 0, asked, total - 1))
            steps = tf.maximum(total - shortest, 1)
            if source:
                start = ids[:, : tf.maximum(tf.reduce_max(lengths), 1)], asked
                result = engine.generate(*source, steps, controls, start=start, limit=total)
            else:
                result = engine.generate(ids, asked, steps, controls, limit=total)
            places = tf.range(total) - lengths[:, tf.newaxis]
            new = tf.gather(result.token_ids, tf.clip_by_value(places, 0, steps - 1), batch_dims=1)
            known = places < result.lengths[:, tf.newaxis]
            return tf.where(places < 0, ids, tf.where(known, new, pad_id)), known

        return tf.function(run, input_signature=[ids, mask, *sources, *settings], autograph=False)


class Answers:
    """Writes texts by the fast loop, with the weights that the model has when it is made.

    For `write_targets(teacher, texts, path, generate=tfvllm.rollouts.Answers(teacher, beams=4), beams=4)`. Greedy
    answers are keras-nlp's own (a prompt without room for an answer loses its beginning here, its end there). Beams are
    those of an export with `task="translate"`; causal models have them too.

    Args:
        model: a keras-nlp `CausalLM` or `Seq2SeqLM` with a preprocessor.
        beams: 1 for greedy search, more for beam search, which needs a family with a reader.
        max_length: of prompt and answer (causal) or answer (sequence to sequence), in tokens; the default is the
            preprocessor's.
        length_penalty: exponent of the length by which a beam's log-probability is divided.
    Raises:
        InputError: no preprocessor, a model that cannot be generated from, or beams where there are none.

    Example:
        >>> known = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
        >>> tokenizer = keras_nlp.models.GPT2Tokenizer(vocabulary=known, merges=["a b"])
        >>> preprocessor = keras_nlp.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=6)
        >>> backbone = keras_nlp.models.GPT2Backbone(4, 1, 2, 8, 16, max_sequence_length=6)
        >>> answer = tfvllm.rollouts.Answers(keras_nlp.models.GPT2CausalLM(backbone, preprocessor))
        >>> [text[:1] for text in answer(["ab", "b"])]  # with its prompt
        ['a', 'b']
    """

    def __init__(
        self, model: keras.Model, *, beams: int = 1, max_length: int | None = None, length_penalty: float = 0.0
    ):
        preprocessor = getattr(model, "preprocessor", None)
        if preprocessor is None:
            raise InputError(f"{type(model).__name__} has no preprocessor, which texts need. Give it one.")
        if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
            raise InputError(f"beams must be a whole number, at least 1; got {beams!r}.")
        if length_penalty < 0:
            raise InputError(f"length_penalty must be at least 0; got {length_penalty!r}.")
        kind = "Seq2SeqLM" if _reads_two(model) else "CausalLM"
        if beams > 1 and not has_reader(model):
            raise InputError(f"beams={beams}: beam search needs a reader, and {unread(model)}.")
        self.model = model
        make = _translator if kind == "Seq2SeqLM" else _generator
        engine: Any = make(model, preprocessor, max_length)

        def answer(texts):
            two = isinstance(engine, Translator)
            read_in = engine.read_sources(texts) if two else engine.read_texts(texts)
            most = tf.constant(engine.room if two else engine.max_length)
            if beams > 1:
                result, _ = engine.beam(*read_in, most, beams, length_penalty)
            else:
                result = engine.generate(*read_in, most)
            return engine.to_texts(result) if two else valid_utf8(engine.decoded(*read_in, result))

        self._answer = tf.function(answer, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """One answer for each text; a causal model's begins with the prompt."""
        return [text.decode() for text in self._answer(tf.constant(list(texts), tf.string)).numpy()]


def _reads_two(model: Any) -> bool:
    return any(name.startswith("encoder_") for name in input_names(model))


def _generator(model: Any, preprocessor: Any, max_length: int | None) -> Generator:
    if has_reader(model):
        spec = read(model, "CausalLM")
        return Generator(spec, **generate.settings(preprocessor, spec.max_positions, max_length))
    refuse_more_than_text(model, "CausalLM")
    settings = generate.settings(preprocessor, positions_of(model), max_length)
    return general.by_own_step(ModelGenerator, model, settings)


def _translator(model: Any, preprocessor: Any, max_length: int | None) -> Generator:
    if has_reader(model):
        return translate.translator_for(read(model, "Seq2SeqLM"), preprocessor, max_length=max_length)
    refuse_more_than_text(model, "Seq2SeqLM")
    settings = translate.settings(preprocessor, (positions_of(model), positions_of(model)), max_length)
    return general.by_own_step(ModelTranslator, model, settings)
