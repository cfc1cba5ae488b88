"""Tiny encoders of every family, each with a real tokenizer of its kind and weights under which mistakes show."""

import functools
import io

import numpy as np

from tests.tiny_models import LETTERS, VOCABULARY, randomise

LENGTH = 48  # with DeBERTa's buckets below, one at which a graph of keras-nlp puts the ends in the wrong one
SENTENCES = ["the film is fine", "not good", "very dull", "bad and good, moving film!", *LETTERS] * 20
TEXTS = [
    "the film is fine",
    "not good",
    "",
    "very good, not bad at all. " * 12,
    "dull",
    "café déjà vu!",
    "很好！好坏",
    "x",
]
SHAPE = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
# What a backbone is made with where it is not `vocabulary_size`, SHAPE and `max_sequence_length`.
_OTHER = {
    "albert": {"embedding_dim": 8},
    "deberta_v3": {"bucket_size": 16},
    "electra": {"embedding_dim": 8},
    "f_net": {"num_heads": None},
    "roformer_v2": {"head_size": 8, "max_sequence_length": None},
}
_CLASSES = {
    "bert": "Bert",
    "distil_bert": "DistilBert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "albert": "Albert",
    "deberta_v3": "DebertaV3",
    "electra": "Electra",
    "f_net": "FNet",
    "roformer_v2": "RoformerV2",
}
FAMILIES = tuple(_CLASSES)
CLASSIFIERS = tuple(family for family in FAMILIES if family != "electra")  # keras-nlp has no ELECTRA classifier
FIXED_LENGTH = ("f_net", "roformer_v2")  # whose answers depend on how far a text is padded


@functools.cache
def sentence_pieces(family: str) -> bytes:
    """A SentencePiece model with the special tokens of `family`."""
    import sentencepiece

    special = {
        "xlm_roberta": {"unk_id": 0, "bos_id": 1, "eos_id": 2},
        "deberta_v3": {
            "pad_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "unk_id": 3,
            "pad_piece": "[PAD]",
            "bos_piece": "[CLS]",
            "eos_piece": "[SEP]",
            "unk_piece": "[UNK]",
            "user_defined_symbols": "[MASK]",
        },
    }.get(
        family,
        {
            "pad_id": 0,
            "unk_id": 1,
            "bos_id": 2,
            "eos_id": 3,
            "pad_piece": "<pad>",
            "unk_piece": "<unk>",
            "bos_piece": "[CLS]",
            "eos_piece": "[SEP]",
            "user_defined_symbols": "[MASK]",
        },
    )
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        vocab_size=60,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
        **special,
    )
    return written.getvalue()


def tokenizer(family: str):
    """A tokenizer of `family` with a tiny vocabulary."""
    import keras_nlp
    from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

    made = getattr(keras_nlp.models, f"{_CLASSES[family]}Tokenizer")
    if family in ("bert", "distil_bert", "electra", "roformer_v2"):
        return made(vocabulary=VOCABULARY, lowercase=True, strip_accents=True)
    if family == "roberta":
        merges = ["g o", "o d", "go od", "Ġ good", "n o", "no t", "Ġ not"]
        pieces = [
            "<s>",
            "<pad>",
            "</s>",
            "<unk>",
            "<mask>",
            *bytes_to_unicode()[1],
            *(m.replace(" ", "") for m in merges),
        ]
        return made(vocabulary={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    return made(sentence_pieces(family))


def preprocessor(family: str, length: int = LENGTH):
    """The classifier's preprocessor of `family`; of BERT for ELECTRA, which has none."""
    import keras_nlp

    name = "Bert" if family == "electra" else _CLASSES[family]
    return getattr(keras_nlp.models, f"{name}TextClassifierPreprocessor")(tokenizer(family), sequence_length=length)


def backbone(family: str, length: int = LENGTH, dtype=None, seed: int = 0):
    """A backbone of `family` with random weights."""
    import keras_nlp

    size = {"electra": "vocab_size"}.get(family, "vocabulary_size")
    options = {size: tokenizer(family).vocabulary_size(), **SHAPE, "max_sequence_length": length, "dtype": dtype}
    options |= _OTHER.get(family, {})
    options = {name: value for name, value in options.items() if value is not None}
    model = getattr(keras_nlp.models, f"{_CLASSES[family]}Backbone")(**options)
    randomise(model, seed, 0.4)
    return model


def classifier(family: str, length: int = LENGTH, dtype=None, seed: int = 0, num_classes: int = 3):
    """A text classifier of `family` with its preprocessor."""
    import keras_nlp

    made = getattr(keras_nlp.models, f"{_CLASSES[family]}TextClassifier")
    options = {} if family == "f_net" or dtype is None else {"dtype": dtype}
    model = made(
        backbone=backbone(family, length, dtype),
        num_classes=num_classes,
        preprocessor=preprocessor(family, length),
        **options,
    )
    randomise(model, seed, 0.4)
    return model


def features(made, texts, *pair) -> dict:
    """What the preprocessor itself makes of texts (and their pairs), each run alone and in plain Python or a pipeline
    as Keras runs it."""
    import tensorflow as tf

    given = tuple(tf.constant(rows) for rows in (texts, *pair))
    if hasattr(made.tokenizer, "merges"):  # in a pipeline it gives -1 for what its vocabulary lacks
        given = tuple(list(rows) for rows in (texts, *pair))
        return made(x=given if pair else given[0])
    dataset = tf.data.Dataset.from_tensors(given).map(lambda *rows: made(x=rows if pair else rows[0]))
    return next(iter(dataset))


def scores(model, texts, *pair) -> np.ndarray:
    """The classifier's own softmax in Keras, padded to full length."""
    import tensorflow as tf

    logits = model(features(model.preprocessor, texts, *pair), training=False)
    return tf.nn.softmax(tf.cast(logits, tf.float32)).numpy()


def embeddings(model, made, texts) -> np.ndarray:
    """Means of a backbone's outputs over the real tokens of each text, of length 1, by NumPy."""
    found = features(made, texts)
    ids = np.asarray(found["token_ids"])
    given = {tensor.name: found.get(tensor.name, ids * 0) for tensor in model.inputs}
    outputs = model(given, training=False)
    outputs = np.asarray(outputs["sequence_output"] if isinstance(outputs, dict) else outputs, np.float32)
    mask = (ids != made.tokenizer.pad_token_id)[..., None]
    means = (outputs * mask).sum(1) / mask.sum(1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)
