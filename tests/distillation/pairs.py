"""Tiny models that stand for the families, and batches with padded rows."""

import numpy as np

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "a", "film", "was", "good", "bad", "very", "not", "dull", "bright", "很", "好", "不"]


def classifier(layers=4, heads=2, width=16, ffn=32, classes=3, words=WORDS, dropout=0.0, preprocessor=True, **options):
    """A tiny keras-nlp BERT classifier with a real tokenizer."""
    import keras_nlp

    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=len(words),
        num_layers=layers,
        num_heads=heads,
        hidden_dim=width,
        intermediate_dim=ffn,
        dropout=dropout,
        max_sequence_length=16,
    )
    made = None
    if preprocessor:
        tokenizer = keras_nlp.models.BertTokenizer(vocabulary=list(words), lowercase=True)
        made = keras_nlp.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return spread_out(
        keras_nlp.models.BertTextClassifier(
            backbone, num_classes=classes, preprocessor=made, dropout=dropout, **options
        )
    )


def batch(rows=6, length=8, vocabulary=18, classes=3, seed=0):
    """Token ids with padded rows (one of a single token), labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)
    lengths[0], lengths[-1] = length, 1
    mask = (np.arange(length)[None] < lengths[:, None]).astype("int32")
    ids = rng.integers(5, vocabulary, (rows, length)).astype("int32") * mask
    x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": mask}
    return x, rng.integers(0, classes, rows).astype("int32")


def causal_lm(layers=4, heads=2, width=16, vocabulary=40, dropout=0.0):
    """A tiny keras-nlp GPT-2."""
    import keras_nlp

    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=width,
        intermediate_dim=2 * width,
        dropout=dropout,
        max_sequence_length=16,
    )
    return spread_out(keras_nlp.models.GPT2CausalLM(backbone))


def seq2seq(layers=2, heads=2, width=16, vocabulary=30):
    """A tiny keras-nlp BART."""
    import keras_nlp

    backbone = keras_nlp.models.BartBackbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=width,
        intermediate_dim=2 * width,
        dropout=0.0,
        max_sequence_length=16,
    )
    return spread_out(keras_nlp.models.BartSeq2SeqLM(backbone))


def lm_batch(rows=5, length=8, vocabulary=40, seed=0):
    """(x, y, sample_weight) as keras-nlp's causal LM preprocessors make them."""
    x, _ = batch(rows, length + 1, vocabulary, seed=seed)
    ids, mask = x["token_ids"], x["padding_mask"]
    return {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}, ids[:, 1:], mask[:, 1:]


def seq2seq_batch(rows=5, source=7, target=6, vocabulary=30, seed=0):
    """(x, y, sample_weight) as keras-nlp's sequence-to-sequence preprocessors make them."""
    encoder, _ = batch(rows, source, vocabulary, seed=seed)
    decoder, y, weight = lm_batch(rows, target, vocabulary, seed=seed + 1)
    x = {f"encoder_{k}": encoder[k] for k in ("token_ids", "padding_mask")}
    x.update({f"decoder_{k}": decoder[k] for k in ("token_ids", "padding_mask")})
    return x, y, weight


def spread_out(model):
    """Weights larger than the initializer's 0.02, so that answers differ."""
    for variable in model.trainable_variables:
        if "kernel" in variable.path or "embedding" in variable.path:
            variable.assign(np.random.default_rng(len(variable.path)).normal(0, 0.3, variable.shape))
    return model
