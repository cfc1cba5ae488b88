"""`task="generate"`: a causal language model as a SavedModel, strings (or ids) in, strings (or ids) out.

Prompts are tokenised, generated from and turned back into text inside one graph. Long and odd requests:

- a prompt too long for `max_length` loses its beginning, so that at least one new token fits; start tokens stay;
- a prompt without any token (an empty string where the tokenizer has no start token, a row of padding) gets no new
  tokens and the finish reason "empty"; an empty batch gives empty outputs;
- text that is no UTF-8 is read with U+FFFD in place of what is wrong; answers are always valid UTF-8;
- `max_new_tokens` 0 or less gives no new tokens; `temperature` 0 and `top_p` 0 are greedy; `top_k` 0 means all;
- a stop string that never comes changes nothing; empty stop strings are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.export import float32, general
from tfvllm.families import read, unread
from tfvllm.generation.generator import Generator, finish_reasons
from tfvllm.generation.model_generator import ModelGenerator, positions_of, refuse_more_than_text
from tfvllm.generation.model_step import model_inputs
from tfvllm.generation.sampling import SamplingParams
from tfvllm.generation.text import codec_for
from tfvllm.graph.probes import check_runs, default_for
from tfvllm.graph.targets import check
from tfvllm.savedmodel import write

PRECISIONS = {"float32": tf.float32, "bfloat16": tf.bfloat16}


def export_task(
    model,
    directory: Path,
    *,
    max_length: int | None = None,
    max_new_tokens: int = 64,
    precision: str = "float32",
    target: str | None = None,
    stop_token_ids: list[int] | None = None,
) -> dict[str, Any]:
    """Writes the SavedModel of a causal language model into `directory` and returns its manifest entries.

    Args:
        model: a keras-nlp `CausalLM`. A family without a reader in `tfvllm.families.registry` goes the general path:
            the model's own decode step in the loop (`tfvllm.generation.model_step`).
        directory: an existing, empty folder.
        max_length: the most tokens of prompt and answer together; default the preprocessor's sequence length, without a
            preprocessor only the model's own limit.
        max_new_tokens: how many tokens `serving_default` generates from text, and the default of `generate`.
        precision: "float32" or "bfloat16", of weights, activations and caches.
        target: "portable" (public ops) or "onednn" (TensorFlow's fused oneDNN ops, which need a TensorFlow built with
            oneDNN on a CPU it knows). Default: portable for float32; for bfloat16 onednn where this
            process can compute it (without, bfloat16 is slow).
        stop_token_ids: tokens that end an answer; default the tokenizer's end tokens, without a tokenizer none.

    Signatures with a preprocessor: `serving_default` (prompts string[batch] -> texts, completions, finish_reasons),
    `generate` (the same with all controls as optional inputs; also token_ids, lengths, log_probs), `prefill`, `decode`
    (the caller holds the caches), `score`. Without: the same on token_ids and padding_mask int32[batch, prompt].
    """
    dtype = PRECISIONS.get(precision)
    if dtype is None:
        raise InputError(f"task 'generate' exports float32 and bfloat16; got precision={precision!r}.")
    target = check(target or default_for(precision))
    check_runs(target, precision)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be a whole number, at least 1; got {max_new_tokens!r}.")
    preprocessor = getattr(model, "preprocessor", None)
    why = unread(model)
    spec = None if why else read(model, "CausalLM")
    if spec is None:
        refuse_more_than_text(model, "CausalLM")
    elif spec.encoder is not None:
        raise InputError(f"{type(model).__name__} is sequence to sequence; expected a causal LM. Use task='translate'.")
    positions = positions_of(model) if spec is None else spec.max_positions
    shared = settings(preprocessor, positions, max_length, stop_token_ids)
    codec = shared["codec"]
    generator: Generator
    if spec is None:
        precision = general.precision_of(model, precision, target, why)
        generator = general.by_own_step(ModelGenerator, model, shared)
        entries = general.entries(model, generator, why, "the signatures prefill and decode")
    else:
        generator = Generator(spec, dtype=dtype, target=target, **shared)
        entries = {
            "family": spec.family,
            "parameters": spec.parameters(),
            "cache_bytes_per_token": generator.network.cache_bytes_per_token,
        }
    entries |= {
        "precision": precision,
        "target": target,
        "interface": "ids" if codec is None else "text",
        "max_length": generator.max_length,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": list(generator.stop_ids),
        "vocabulary_size": generator.vocabulary_size,
    }
    del spec  # the generator has its own copy of all weights
    make = _id_signatures if codec is None else _text_signatures
    signatures = make(generator, max_new_tokens)
    if isinstance(generator, ModelGenerator):
        signatures = {name: signatures[name] for name in ("serving_default", "generate", "score")}
    else:
        signatures["decode"] = _decode(generator)
    write.save(generator, signatures, directory)
    return {**entries, "check": lambda: _check(model, generator, precision), "warmup": _warmup(generator)}


def settings(
    preprocessor: Any,
    positions: int | None,
    max_length: int | None = None,
    stop_token_ids: list[int] | None = None,
) -> dict[str, Any]:
    """What a `Generator` is made with beside a model that has so many positions; the last two as for `export_task`."""
    if preprocessor is not None and max_length is None:
        max_length = preprocessor.sequence_length
    if max_length is not None and positions is not None and max_length > positions:
        raise InputError(
            f"max_length is {max_length}, but the model has positions for {positions} tokens. "
            f"Pass max_length={positions} or less."
        )
    codec, pad_id = None, 0
    start_ids: tuple[int, ...] = ()
    if preprocessor is not None:
        tokenizer = preprocessor.tokenizer
        codec = codec_for(tokenizer)
        start = getattr(tokenizer, "start_token_id", None)
        start_ids = () if start is None else (int(start),)  # as keras-nlp's generate, whatever add_start_token says
        pad_id = int(getattr(tokenizer, "pad_token_id", None) or 0)
        if stop_token_ids is None:
            stop_token_ids = end_token_ids(tokenizer)
    return {
        "codec": codec,
        "max_length": max_length,
        "start_ids": start_ids,
        "stop_ids": tuple(int(token) for token in stop_token_ids or ()),
        "pad_id": pad_id,
    }


def end_token_ids(tokenizer) -> list[int]:
    """The tokens at which keras-nlp's own `generate` stops."""
    ids = [getattr(tokenizer, name, None) for name in ("end_token_id", "end_token2_id")]
    turns = {"Gemma3": "<end_of_turn>", "Gemma4": "<turn|>"}
    end_of_turn = next((end for name, end in turns.items() if type(tokenizer).__name__.startswith(name)), None)
    if end_of_turn is not None:
        found = tokenizer.token_to_id(end_of_turn)
        ids.append(None if found == tokenizer._unk_token_id else found)
    return [int(token) for token in ids if token is not None]


def inputs_of(**specs) -> list[tf.TensorSpec]:
    return [tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in specs.items()]


def plain_function(input_signature):
    """tf.function without AutoGraph: the engine says `tf.cond` and `tf.while_loop` itself."""
    return tf.function(input_signature=input_signature, autograph=False)


CONTROLS: dict[str, tuple[list, tf.DType]] = {
    "temperature": ([], tf.float32),
    "top_k": ([], tf.int32),
    "top_p": ([], tf.float32),
    "repetition_penalty": ([], tf.float32),
    "no_repeat_ngram": ([], tf.int32),
    "seed": ([], tf.int32),
}
# Greedy, nothing cut, nothing penalised: what a request gets that does not say otherwise.
NEUTRAL = {
    "temperature": tf.constant(0.0),
    "top_k": tf.constant(0),
    "top_p": tf.constant(1.0),
    "repetition_penalty": tf.constant(1.0),
    "no_repeat_ngram": tf.constant(0),
    "seed": tf.constant(0),
}


def _text_signatures(generator: Generator, max_new_tokens: int) -> dict[str, Any]:
    texts = ([None], tf.string)
    count, no_stops = tf.constant(max_new_tokens), tf.constant([], tf.string)

    @plain_function(inputs_of(prompts=texts))
    def serving_default(prompts):
        result = generator.generate_texts(prompts, max_new_tokens)
        return {name: result[name] for name in ("texts", "completions", "finish_reasons")}

    @plain_function(inputs_of(prompts=texts, max_new_tokens=([], tf.int32), **CONTROLS, stop_strings=texts))
    def generate(
        prompts,
        max_new_tokens=count,
        temperature=NEUTRAL["temperature"],
        top_k=NEUTRAL["top_k"],
        top_p=NEUTRAL["top_p"],
        repetition_penalty=NEUTRAL["repetition_penalty"],
        no_repeat_ngram=NEUTRAL["no_repeat_ngram"],
        seed=NEUTRAL["seed"],
        stop_strings=no_stops,
    ):
        controls = SamplingParams(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram, seed)
        return generator.generate_texts(prompts, max_new_tokens, controls, stop_strings, log_probs=True)

    @plain_function(inputs_of(prompts=texts, max_new_tokens=([], tf.int32)))
    def prefill(prompts, max_new_tokens=count):
        return generator.prefill(*generator.read_texts(prompts), max_new_tokens)

    @plain_function(inputs_of(texts=texts))
    def score(texts):
        ids, lengths = generator.read_texts(texts, room=0)
        return {"token_ids": ids, **generator.score(ids, lengths)}

    return {
        "serving_default": serving_default,
        "generate": generate,
        "prefill": prefill,
        "score": score,
    }


def _id_signatures(generator: Generator, max_new_tokens: int) -> dict[str, Any]:
    ids = ([None, None], tf.int32)
    count = tf.constant(max_new_tokens)

    @plain_function(inputs_of(token_ids=ids, padding_mask=ids, max_new_tokens=([], tf.int32)))
    def serving_default(token_ids, padding_mask, max_new_tokens):
        result = generator.generate(*generator.read_ids(token_ids, padding_mask), max_new_tokens)
        return {"token_ids": result.token_ids, "lengths": result.lengths}

    @plain_function(inputs_of(token_ids=ids, padding_mask=ids, max_new_tokens=([], tf.int32), **CONTROLS))
    def generate(
        token_ids,
        padding_mask,
        max_new_tokens=count,
        temperature=NEUTRAL["temperature"],
        top_k=NEUTRAL["top_k"],
        top_p=NEUTRAL["top_p"],
        repetition_penalty=NEUTRAL["repetition_penalty"],
        no_repeat_ngram=NEUTRAL["no_repeat_ngram"],
        seed=NEUTRAL["seed"],
    ):
        controls = SamplingParams(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram, seed)
        prompt = generator.read_ids(token_ids, padding_mask)
        result = generator.generate(*prompt, max_new_tokens, controls, log_probs=True)
        return {
            "token_ids": result.token_ids,
            "lengths": result.lengths,
            "log_probs": result.log_probs,
            "finish_reasons": finish_reasons(result.reasons),
        }

    @plain_function(inputs_of(token_ids=ids, padding_mask=ids, max_new_tokens=([], tf.int32)))
    def prefill(token_ids, padding_mask, max_new_tokens=count):
        return generator.prefill(*generator.read_ids(token_ids, padding_mask), max_new_tokens)

    @plain_function(inputs_of(token_ids=ids, padding_mask=ids))
    def score(token_ids, padding_mask):
        read_ids, lengths = generator.read_ids(token_ids, padding_mask, room=0)
        return generator.score(read_ids, lengths)

    return {
        "serving_default": serving_default,
        "generate": generate,
        "prefill": prefill,
        "score": score,
    }


def _decode(generator: Generator):
    rows = {"token_ids": tf.TensorSpec([None], tf.int32), "positions": tf.TensorSpec([None], tf.int32)}
    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in rows.items()}
    specs |= generator.cache_specs()

    @tf.function(autograph=False)
    def decode(**inputs):
        token_ids, positions = inputs.pop("token_ids"), inputs.pop("positions")
        return generator.decode(token_ids, positions, inputs)

    return decode.get_concrete_function(**specs)


def _check(model, generator: Generator, precision: str) -> dict[str, Any]:
    """Log-probabilities of a few rows by the Keras model itself, for the export to be held against."""
    random = np.random.default_rng(0)
    length = min(12, generator.max_length or 12)
    lengths = [length, max(length // 2, 1)]
    ids = random.integers(0, generator.vocabulary_size, [2, length]).astype(np.int32)
    mask = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
    if generator.codec is not None:
        texts = np.array([b"The quick brown fox", "\u4f60\u597d".encode()], object)
        read_ids, lengths = (tensor.numpy() for tensor in generator.read_texts(tf.constant(texts), room=0))
        ids, mask = read_ids, (np.arange(read_ids.shape[1]) < lengths[:, None]).astype(np.int32)
    features = model_inputs(model, tf.constant(ids), tf.constant(mask))
    inputs = {"token_ids": ids * mask, "padding_mask": mask} if generator.codec is None else {"texts": texts}
    return {"signature": "score", "inputs": inputs, **expected_log_probs(model, features, ids, mask, precision)}


def expected_log_probs(model, features: Any, ids: np.ndarray, mask: np.ndarray, precision: str) -> dict[str, Any]:
    """What `score` of an export must answer: `expected`, `atol`, `rtol` for `tfvllm.savedmodel.parity.check`.

    Args:
        model: the Keras model; features: its inputs.
        ids, mask: int32[batch, length], the tokens scored.
        precision: of the export.
    """
    logits, exact = float32.answer(model, features)
    log_probs = tf.gather(tf.nn.log_softmax(logits)[:, :-1], ids[:, 1:], batch_dims=2).numpy() * mask[:, 1:]
    expected = np.concatenate([np.zeros_like(log_probs[:, :1]), log_probs], axis=1)
    allowed = {"atol": general.TOLERANCE[precision], "rtol": 0.02 if precision == "bfloat16" else 1e-4}
    if not exact:
        coarse = float32.tolerance(model, steps=8.0)
        allowed = {name: max(value, coarse[name]) for name, value in allowed.items()}
    return {"expected": {"log_probs": expected}, **allowed}


def _warmup(generator: Generator) -> list[dict]:
    examples = []
    for batch in (1, 4):
        if generator.codec is not None:
            prompts = np.array([b"a warm-up prompt"] * batch, object)
            inputs: dict[str, Any] = {"prompts": prompts}
        else:
            ids = np.zeros([batch, 4], np.int32)
            inputs = {"token_ids": ids, "padding_mask": ids + 1, "max_new_tokens": np.array(4, np.int32)}
        examples.append({"signature_name": "serving_default", "inputs": inputs, "replay": batch == 1})
    return examples
