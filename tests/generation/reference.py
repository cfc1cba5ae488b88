"""keras-nlp's own generation, and plain references computed one whole forward pass at a time.

All of it runs eagerly: for models as small as these, tracing keras-nlp's step takes longer than its steps.
"""

import keras_nlp
import numpy as np
import tensorflow as tf

# Whose cached step computes something else than the model: keras-nlp's GPT-NeoX turns every query of a step as if it
# stood at position 0. What `generate` should give is what whole forward passes give.
WRONG_STEPS = (keras_nlp.models.GPTNeoXCausalLM,)
# Whose step does not repeat the encoder's padding mask for the beams: it fits them where there is one source only.
ONE_SOURCE_OF_BEAMS = (keras_nlp.models.T5GemmaSeq2SeqLM,)


def filled_by_forward_passes(model, ids, lengths):
    """`ids` int32[batch, length] with greedy tokens from each row's end on, each by a forward pass."""
    found = np.array(ids, np.int32)
    for place in range(min(lengths), found.shape[1]):
        logits = model({"token_ids": found, "padding_mask": np.ones_like(found)}, training=False)
        found[:, place] = np.where(place < np.asarray(lengths), found[:, place], np.argmax(logits[:, place - 1], -1))
    return found


def keras_generate(model, ids, mask, count, *, stop=None):
    """New tokens int32[batch, count] of keras-nlp's generate function, greedy, each row from its own end."""
    model.compile(sampler="greedy", run_eagerly=True)
    batch, lengths = len(ids), mask.sum(1)
    total = lengths.max() + count
    full = np.zeros([batch, total], np.int32)
    full[:, : ids.shape[1]] = ids
    padding = np.arange(total) < lengths[:, None]
    if isinstance(model, WRONG_STEPS):
        assert stop is None
        found = filled_by_forward_passes(model, full, lengths)
        return np.stack([row[length : length + count] for row, length in zip(found, lengths)])
    # The generate function itself: the public method fails for Gemma 3 without a preprocessor.
    inputs = {"token_ids": tf.constant(full), "padding_mask": tf.constant(padding)}
    found = model.make_generate_function()(inputs, stop_token_ids=stop)["token_ids"].numpy()
    return np.stack([row[length : length + count] for row, length in zip(found, lengths)])


def keras_translate(model, ids, mask, start, count, sampler="greedy"):
    """New tokens int32[batch, count] of keras-nlp's generate function for a Seq2SeqLM."""
    if isinstance(model, ONE_SOURCE_OF_BEAMS) and not isinstance(sampler, str) and len(ids) > 1:
        parts = [(ids[row : row + 1], mask[row : row + 1]) for row in range(len(ids))]
        return np.concatenate([keras_translate(model, *part, start, count, sampler) for part in parts])
    model.compile(sampler=sampler, run_eagerly=True)
    decoder = np.zeros([len(ids), len(start) + count], np.int32)
    decoder[:, : len(start)] = start
    inputs = {
        "encoder_token_ids": tf.constant(ids),
        "encoder_padding_mask": tf.constant(mask.astype(bool)),
        "decoder_token_ids": tf.constant(decoder),
        "decoder_padding_mask": tf.constant(np.broadcast_to(np.arange(len(start) + count) < len(start), decoder.shape)),
    }
    found = model.make_generate_function()(inputs, stop_token_ids=None)["decoder_token_ids"].numpy()
    return found[:, len(start) :]


def keras_prompts(model, texts):
    """ids and mask int32[batch, length] that the preprocessor of a CausalLM or Seq2SeqLM makes of texts."""
    features = model.preprocessor.generate_preprocess(texts)
    side = "encoder_" if "encoder_token_ids" in features else ""
    ids, mask = (np.asarray(features[f"{side}{name}"], np.int32) for name in ("token_ids", "padding_mask"))
    longest = mask.sum(1).max()
    return ids[:, :longest] * mask[:, :longest], mask[:, :longest]


def beam_sampler(beams):
    return keras_nlp.samplers.BeamSampler(num_beams=beams)


def log_probs(model, row):
    """float64[length, vocabulary]: what a causal model thinks of the token after each one of `row`."""
    ids = np.asarray([row], np.int32)
    logits = np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))[0].astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def seq2seq_log_probs(model, source, target):
    """float64[vocabulary] after the whole of `target`."""
    source, target = np.asarray([source], np.int32), np.asarray([target], np.int32)
    logits = model(
        {
            "encoder_token_ids": source,
            "encoder_padding_mask": np.ones_like(source),
            "decoder_token_ids": target,
            "decoder_padding_mask": np.ones_like(target),
        }
    )
    logits = np.asarray(logits)[0, -1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def beam_search(next_log_probs, start, beams, stop, penalty, count):
    """Beam search in lists: (tokens, score) of the best answer. next_log_probs(row) -> float64[vocabulary]."""
    live, done = [((), 0.0)], []
    for step in range(count):
        candidates = []
        for tokens, score in live:
            scores = next_log_probs([*start, *tokens])
            candidates += [((*tokens, token), score + value) for token, value in enumerate(scores)]
        candidates = sorted(candidates, key=lambda item: -item[1])[: 2 * beams]
        live = []
        for tokens, score in candidates:
            if tokens[-1] in stop or step == count - 1:
                done.append((tokens, score / len(tokens) ** penalty))
            elif len(live) < beams:
                live.append((tokens, score))
        done = sorted(done, key=lambda item: -item[1])[:beams]
        if len(done) == beams and live and done[-1][1] >= live[0][1] / count**penalty:
            break
    return done[0]
