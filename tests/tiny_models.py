"""Tiny models for the tests of exports and serving, with weights large enough that a wrong answer shows."""

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*"好很坏.,!?", "the", "film", "is", "fine", "moving", "bad", "good", "not", "very", "dull"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *("##" + letter for letter in LETTERS)]
TEXTS = [
    "the film is fine",
    "not good",
    "",
    "很好！ very good, not bad at all. " * 12,
    "dull",
    "café!",
]


def randomise(model, seed: int = 0, scale: float = 0.5) -> None:
    """Gives a Keras model weights under which scores differ clearly between inputs."""
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        if len(weight.shape) > 1:
            weight.assign(generator.normal(0, scale, weight.shape))
        else:
            weight.assign(weight + generator.normal(0, 0.1, weight.shape))


def bert_classifier(num_classes: int = 2, activation=None, sequence_length: int = 48, seed: int = 0, layers: int = 1):
    """A BERT text classifier with a WordPiece tokenizer."""
    import keras_nlp

    tokenizer = keras_nlp.models.BertTokenizer(vocabulary=VOCABULARY, lowercase=True)
    preprocessor = keras_nlp.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=sequence_length)
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=len(VOCABULARY),
        num_layers=layers,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=sequence_length,
    )
    model = keras_nlp.models.BertTextClassifier(
        backbone=backbone, num_classes=num_classes, preprocessor=preprocessor, activation=activation
    )
    randomise(model, seed)
    return model


def keras_scores(model, texts, softmax: bool = True) -> np.ndarray:
    """The model's own answer: its preprocessor in a tf.data pipeline (padded to full length), logits, softmax."""
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(tf.constant(texts)).batch(len(texts)).map(model.preprocessor)
    logits = model(next(iter(dataset)), training=False)
    return (tf.nn.softmax(logits) if softmax else tf.convert_to_tensor(logits)).numpy()


def save_many(directory, factor: float = 2.0) -> None:
    """A SavedModel with every kind of signature: two inputs, bytes, scalars, classify, regress, and a failing one."""
    import tensorflow as tf

    from tfvllm.savedmodel import write

    module = tf.Module()
    module.factor = tf.Variable(factor)
    no_ends = tf.constant([], tf.string)

    def spec(shape, dtype, name):
        return tf.TensorSpec(shape, dtype, name=name)

    @tf.function(input_signature=[spec([None, 3], tf.float32, "a"), spec([None], tf.int32, "b")])
    def two(a, b):
        return {"sum": tf.reduce_sum(a, axis=1) * module.factor, "twice": b * 2}

    @tf.function(input_signature=[spec([None], tf.string, "image_bytes")])
    def echo(image_bytes):
        return {"copy_bytes": image_bytes, "length": tf.strings.length(image_bytes)}

    @tf.function(input_signature=[spec([None, None], tf.int64, "ids")])
    def ragged(ids):
        return {"total": tf.reduce_sum(ids, axis=1), "width": tf.fill([tf.shape(ids)[0]], tf.shape(ids)[1])}

    @tf.function(input_signature=[spec([None], tf.string, "text"), spec([], tf.int32, "times")])
    def repeat(text, times):
        return {"out": tf.strings.reduce_join(tf.tile(text[:, None], [1, times]), axis=1), "rows": tf.shape(text)}

    @tf.function(input_signature=[spec([None], tf.string, "text"), spec([], tf.int32, "times")])
    def repeat_rows(text, times):
        return {"out": tf.strings.reduce_join(tf.tile(text[:, None], [1, times]), axis=1)}

    @tf.function(input_signature=[spec([None], tf.string, "text"), spec([None], tf.string, "ends")])
    def cut(text, ends=no_ends):
        pattern = tf.strings.reduce_join(ends, separator="|")
        found = tf.strings.regex_replace(text, tf.strings.join(["(", pattern, ").*"]), "")
        return {"out": tf.cond(tf.size(ends) > 0, lambda: found, lambda: text)}

    @tf.function(input_signature=[spec([None], tf.string, "inputs")])
    def classify(inputs):
        x = tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([2], tf.float32)})["x"]
        return {"classes": tf.tile(tf.constant([["no", "yes"]]), [tf.shape(x)[0], 1]), "scores": x * module.factor}

    @tf.function(input_signature=[spec([None], tf.string, "inputs")])
    def regress(inputs):
        x = tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([2], tf.float32)})["x"]
        return {"outputs": tf.reduce_sum(x, axis=1) * module.factor}

    @tf.function(input_signature=[spec([None], tf.float32, "x")])
    def picky(x):
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, message="x must not be negative")]):
            return {"root": tf.sqrt(x), "half": tf.cast(x, tf.bfloat16), "flag": x > 1.0, "big": tf.cast(x, tf.float64)}

    functions = {
        "serving_default": two,
        "echo": echo,
        "ragged": ragged,
        "repeat": repeat,
        "repeat_rows": repeat_rows,
        "cut": cut,
        "classify": classify,
        "regress": regress,
        "picky": picky,
    }
    write.save(
        module,
        functions,
        directory,
        {"classify": write.CLASSIFY, "regress": write.REGRESS},
    )
