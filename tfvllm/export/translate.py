"""`task="translate"`: a sequence-to-sequence model as a SavedModel, source texts (or ids) in, target texts out.

Greedy, sampled, or by beam search. What `tfvllm.export.generate` says about long and odd requests holds here too, but
for sources: one that is too long for the encoder loses its end, as in keras-nlp's own preprocessor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.export import general
from tfvllm.export.generate import (
    CONTROLS,
    NEUTRAL,
    PRECISIONS,
    end_token_ids,
    expected_log_probs,
    inputs_of,
    plain_function,
)
from tfvllm.families import read, unread
from tfvllm.families.spec import LanguageModel
from tfvllm.generation.generator import finish_reasons
from tfvllm.generation.model_generator import ModelTranslator, positions_of, refuse_more_than_text
from tfvllm.generation.sampling import SamplingParams
from tfvllm.generation.text import codec_for
from tfvllm.generation.translator import Translator
from tfvllm.graph.probes import check_runs, default_for
from tfvllm.graph.targets import check
from tfvllm.savedmodel import write


def export_task(
    model,
    directory: Path,
    *,
    max_length: int | None = None,
    max_source_length: int | None = None,
    precision: str = "float32",
    target: str | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    start_token_ids: list[int] | None = None,
    stop_token_ids: list[int] | None = None,
) -> dict[str, Any]:
    """Writes the SavedModel of a sequence-to-sequence model into `directory` and returns its manifest entries.

    Args:
        model: a keras-nlp `Seq2SeqLM`. A family without a reader goes the general path, as for `generate`.
        directory: an existing, empty folder.
        max_length: the most target tokens, start tokens included; default the preprocessor's decoder length.
        max_source_length: the most source tokens; default the preprocessor's encoder length.
        precision, target: as for `generate`.
        beams: how many answers `serving_default` keeps in view; 1 is greedy. More than 1 adds the signature `beam`.
        length_penalty: exponent of the length by which a beam's log-probability is divided; the default of `beam`.
        start_token_ids: what the decoder starts from; default the preprocessor's; required without one.
        stop_token_ids: tokens that end an answer; default the tokenizer's end tokens.

    Signatures with a preprocessor: `serving_default` (texts string[batch] -> translations, finish_reasons),
    `generate` (the same greedy or sampled, all controls as optional inputs; also token_ids, lengths, log_probs), `beam`
    (length_penalty and max_new_tokens as optional inputs; also scores), `score` (texts, targets -> log_probs, total,
    perplexity). Without one: token_ids and padding_mask int32[batch, source] in, token_ids and lengths out.
    """
    dtype = PRECISIONS.get(precision)
    if dtype is None:
        raise InputError(f"task 'translate' exports float32 and bfloat16; got precision={precision!r}.")
    target = check(target or default_for(precision))
    check_runs(target, precision)
    if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
        raise InputError(f"beams must be a whole number, at least 1; got {beams!r}.")
    if length_penalty < 0:
        raise InputError(f"length_penalty must be at least 0; got {length_penalty!r}.")
    given: dict[str, Any] = {
        "max_length": max_length,
        "max_source_length": max_source_length,
        "start_token_ids": start_token_ids,
        "stop_token_ids": stop_token_ids,
    }
    preprocessor = getattr(model, "preprocessor", None)
    translator: Translator
    why = unread(model)
    if not why:
        spec = read(model, "Seq2SeqLM")
        translator = translator_for(spec, preprocessor, dtype=dtype, target=target, **given)
        entries = {
            "family": spec.family,
            "parameters": spec.parameters(),
            "cache_bytes_per_token": translator.network.cache_bytes_per_token,
        }
        del spec  # the translator has its own copy of all weights
    else:
        refuse_more_than_text(model, "Seq2SeqLM")
        precision = general.precision_of(model, precision, target, why)
        if beams > 1:
            raise InputError(f"beams={beams}: beam search needs a reader, and {why}.")
        limits = (positions_of(model), positions_of(model))
        translator = general.by_own_step(ModelTranslator, model, settings(preprocessor, limits, **given))
        entries = general.entries(model, translator, why, "beam search")
    codec = translator.codec
    entries |= {
        "precision": precision,
        "target": target,
        "interface": "ids" if codec is None else "text",
        "max_length": translator.max_length,
        "max_source_length": translator.max_source_length,
        "beams": beams,
        "length_penalty": float(length_penalty),
        "start_token_ids": list(translator.start_ids),
        "stop_token_ids": list(translator.stop_ids),
        "vocabulary_size": translator.vocabulary_size,
    }
    make = _id_signatures if codec is None else _text_signatures
    write.save(translator, make(translator, beams, float(length_penalty)), directory)
    return {**entries, "check": lambda: _check(model, translator, precision), "warmup": _warmup(translator)}


def translator_for(
    spec: LanguageModel, preprocessor: Any, *, dtype: tf.DType = tf.float32, target: str = "portable", **given: Any
) -> Translator:
    """The engine behind an export: what it takes from the model's preprocessor, and what has to be given without one.

    Args:
        spec: the model.
        preprocessor: the model's, or None.
        dtype: of weights and caches.
        target: as for `export_task`.
        given: max_length, max_source_length, start_token_ids and stop_token_ids, as for `export_task`.

    Raises:
        InputError: no encoder; nothing to start from; no limit, or one beyond the model's positions.
    """
    if spec.encoder is None:
        raise InputError(
            f"a model of the family {spec.family} has no encoder; expected a Seq2SeqLM. Use task='generate'."
        )
    tables = [stack.position_table for stack in (spec.decoder, spec.encoder)]
    limits = [None if table is None else table.shape[0] for table in tables]
    return Translator(spec, dtype=dtype, target=target, **settings(preprocessor, (limits[0], limits[1]), **given))


def settings(
    preprocessor: Any,
    positions: tuple[int | None, int | None],
    max_length: int | None = None,
    max_source_length: int | None = None,
    start_token_ids: list[int] | None = None,
    stop_token_ids: list[int] | None = None,
) -> dict[str, Any]:
    """What a `Translator` is made with beside a model; positions: the most of its decoder and of its encoder."""
    codec, pad_id = None, 0
    source_ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if preprocessor is not None:
        if not preprocessor.built:
            preprocessor.build(None)
        tokenizer = preprocessor.tokenizer
        codec = codec_for(tokenizer)
        pad_id = int(getattr(tokenizer, "pad_token_id", None) or 0)
        max_length = max_length or preprocessor.decoder_sequence_length
        max_source_length = max_source_length or preprocessor.encoder_sequence_length
        source_ends = _around_sources(preprocessor)
        if start_token_ids is None:
            start_token_ids = list(_ids(preprocessor.decoder_packer.start_value))
        if stop_token_ids is None:
            stop_token_ids = end_token_ids(tokenizer)
    if not start_token_ids:
        raise InputError(
            "the decoder needs something to start from: pass start_token_ids=[...] (BART: [2, 0], T5: [0])."
        )
    asked = (("max_length", max_length), ("max_source_length", max_source_length))
    for (name, value), known in zip(asked, positions, strict=True):
        if value is not None and known is not None and value > known:
            raise InputError(f"{name} is {value}, but the model has positions for {known} tokens. Pass less.")
    if max_length is None and positions[0] is None:
        raise InputError("nothing limits the length of an answer: pass max_length=...")
    return {
        "codec": codec,
        "max_length": max_length,
        "max_source_length": max_source_length,
        "source_start_ids": source_ends[0],
        "source_end_ids": source_ends[1],
        "start_ids": tuple(int(token) for token in start_token_ids),
        "stop_ids": tuple(int(token) for token in stop_token_ids or ()),
        "pad_id": pad_id,
    }


def _ids(value) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(token) for token in (value if isinstance(value, (list, tuple)) else [value]))


def _around_sources(preprocessor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and after a source: of its packer's start and end tokens those that an empty one gets.

    T5Gemma's preprocessor leaves them out when it asks its packer for a source to answer.
    """
    features = preprocessor.generate_preprocess([""])
    found = tuple(np.asarray(features["encoder_token_ids"])[np.asarray(features["encoder_padding_mask"]) > 0].tolist())
    start, end = _ids(preprocessor.encoder_packer.start_value), _ids(preprocessor.encoder_packer.end_value)
    start = start if found[: len(start)] == start else ()
    return start, end if found[len(start) :] == end else ()


def _text_signatures(translator: Translator, beams: int, length_penalty: float) -> dict[str, Any]:
    texts = ([None], tf.string)
    room = translator.room
    most, usual_penalty = tf.constant(room), tf.constant(length_penalty)

    def answer(result, scores=None):
        named = {
            "translations": translator.to_texts(result),
            "token_ids": result.token_ids,
            "lengths": result.lengths,
            "finish_reasons": finish_reasons(result.reasons),
        }
        if result.log_probs is not None:
            named["log_probs"] = result.log_probs
        return named if scores is None else {**named, "scores": scores}

    @plain_function(inputs_of(texts=texts))
    def serving_default(texts):
        source = translator.read_sources(texts)
        if beams > 1:
            result, _ = translator.beam(*source, room, beams, length_penalty)
        else:
            result = translator.generate(*source, room)
        return {name: answer(result)[name] for name in ("translations", "finish_reasons")}

    @plain_function(inputs_of(texts=texts, max_new_tokens=([], tf.int32), **CONTROLS))
    def generate(
        texts,
        max_new_tokens=most,
        temperature=NEUTRAL["temperature"],
        top_k=NEUTRAL["top_k"],
        top_p=NEUTRAL["top_p"],
        repetition_penalty=NEUTRAL["repetition_penalty"],
        no_repeat_ngram=NEUTRAL["no_repeat_ngram"],
        seed=NEUTRAL["seed"],
    ):
        controls = SamplingParams(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram, seed)
        return answer(translator.generate(*translator.read_sources(texts), max_new_tokens, controls, log_probs=True))

    @plain_function(inputs_of(texts=texts, max_new_tokens=([], tf.int32), length_penalty=([], tf.float32)))
    def beam(texts, max_new_tokens=most, length_penalty=usual_penalty):
        return answer(*translator.beam(*translator.read_sources(texts), max_new_tokens, beams, length_penalty))

    @plain_function(inputs_of(texts=texts, targets=texts))
    def score(texts, targets):
        return translator.score(*translator.read_sources(texts), *translator.read_targets(targets))

    signatures = {"serving_default": serving_default, "generate": generate, "score": score}
    return signatures | ({"beam": beam} if beams > 1 else {})


def _id_signatures(translator: Translator, beams: int, length_penalty: float) -> dict[str, Any]:
    ids = ([None, None], tf.int32)
    usual_penalty = tf.constant(length_penalty)
    source_specs = {"token_ids": ids, "padding_mask": ids, "max_new_tokens": ([], tf.int32)}

    def answer(result, scores=None):
        named = {"token_ids": result.token_ids, "lengths": result.lengths}
        if result.log_probs is not None:
            named["log_probs"] = result.log_probs
        return named if scores is None else {**named, "scores": scores}

    @plain_function(inputs_of(**source_specs))
    def serving_default(token_ids, padding_mask, max_new_tokens):
        source = translator.read_source_ids(token_ids, padding_mask)
        if beams > 1:
            result, _ = translator.beam(*source, max_new_tokens, beams, length_penalty)
        else:
            result = translator.generate(*source, max_new_tokens)
        return answer(result)

    @plain_function(inputs_of(**source_specs, **CONTROLS))
    def generate(
        token_ids,
        padding_mask,
        max_new_tokens,
        temperature=NEUTRAL["temperature"],
        top_k=NEUTRAL["top_k"],
        top_p=NEUTRAL["top_p"],
        repetition_penalty=NEUTRAL["repetition_penalty"],
        no_repeat_ngram=NEUTRAL["no_repeat_ngram"],
        seed=NEUTRAL["seed"],
    ):
        controls = SamplingParams(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram, seed)
        source = translator.read_source_ids(token_ids, padding_mask)
        result = translator.generate(*source, max_new_tokens, controls, log_probs=True)
        return {**answer(result), "finish_reasons": finish_reasons(result.reasons)}

    @plain_function(inputs_of(**source_specs, length_penalty=([], tf.float32)))
    def beam(token_ids, padding_mask, max_new_tokens, length_penalty=usual_penalty):
        return answer(
            *translator.beam(
                *translator.read_source_ids(token_ids, padding_mask), max_new_tokens, beams, length_penalty
            )
        )

    @plain_function(inputs_of(token_ids=ids, padding_mask=ids, target_ids=ids, target_mask=ids))
    def score(token_ids, padding_mask, target_ids, target_mask):
        return translator.score(
            *translator.read_source_ids(token_ids, padding_mask), *translator.read_target_ids(target_ids, target_mask)
        )

    signatures = {"serving_default": serving_default, "generate": generate, "score": score}
    return signatures | ({"beam": beam} if beams > 1 else {})


def _check(model, translator: Translator, precision: str) -> dict[str, Any]:
    """Log-probabilities of a few targets by the Keras model itself."""
    if translator.codec is None:
        random = np.random.default_rng(0)
        ids = random.integers(0, translator.vocabulary_size, [2, 7]).astype(np.int32)
        mask = (np.arange(7) < np.array([[7], [4]])).astype(np.int32)
        targets, target_mask = ids[:, ::-1].copy(), mask
        inputs = {"token_ids": ids * mask, "padding_mask": mask, "target_ids": targets * mask, "target_mask": mask}
    else:
        texts = np.array([b"Two dogs run.", "\u4f60\u597d".encode()], object)
        ids, mask = (tensor.numpy() for tensor in translator.read_sources(tf.constant(texts)))
        targets, lengths = (tensor.numpy() for tensor in translator.read_targets(tf.constant(texts[::-1])))
        target_mask = (np.arange(targets.shape[1]) < lengths[:, None]).astype(np.int32)
        inputs = {"texts": texts, "targets": texts[::-1].copy()}
    features = {
        "encoder_token_ids": ids,
        "encoder_padding_mask": mask.astype(np.int32),
        "decoder_token_ids": targets,
        "decoder_padding_mask": target_mask,
    }
    expected = expected_log_probs(
        model, {name: tf.constant(value) for name, value in features.items()}, targets, target_mask, precision
    )
    return {"signature": "score", "inputs": inputs, **expected}


def _warmup(translator: Translator) -> list[dict]:
    examples = []
    for batch in (1, 4):
        if translator.codec is not None:
            inputs: dict[str, Any] = {"texts": np.array([b"a warm-up sentence"] * batch, object)}
        else:
            ids = np.zeros([batch, 4], np.int32)
            inputs = {"token_ids": ids, "padding_mask": ids + 1, "max_new_tokens": np.array(4, np.int32)}
        examples.append({"signature_name": "serving_default", "inputs": inputs, "replay": batch == 1})
    return examples
