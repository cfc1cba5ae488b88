"""The exported SavedModels, called as a server calls them: in a process without Keras and tfvllm."""

import json

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.capi.loader import run
from tfvllm.errors import InputError
from tfvllm.export.embed import pool
from tfvllm.generation.cache import grow_caches
from tfvllm.savedmodel import manifest, parity, protos, warmup

from .models import VOCABULARY, bart, build, gpt2, prompts
from .reference import keras_generate, keras_translate

M = keras_nlp.models
PROMPTS = ["a quick fox", "", "fox", "quick a quick a quick", "\u4f60\u597d a"]


def tokenizer(kind=M.GPT2Tokenizer, specials=("<unused>", "<|endoftext|>")):
    """A byte-level tokenizer: every byte is a token, and a few words are.

    No end token stands at 0: keras-nlp pads with 0 and would take its own padding for the end.
    """
    from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

    vocabulary = {special: index for index, special in enumerate(specials)}
    for character in bytes_to_unicode()[1]:
        vocabulary.setdefault(character, len(vocabulary))
    merges = ["\u0120 q", "u i", "c k", "ui ck", "\u0120q uick", "f o", "fo x", "\u0120 fox"]
    for merge in merges:
        vocabulary.setdefault(merge.replace(" ", ""), len(vocabulary))
    return kind(vocabulary=vocabulary, merges=merges)


@pytest.fixture(scope="module")
def text_model():
    tokens = tokenizer()
    backbone = M.GPT2Backbone(tokens.vocabulary_size(), 2, 4, 32, 64, max_sequence_length=64)
    preprocessor = M.GPT2CausalLMPreprocessor(tokens, sequence_length=32)
    return build(lambda: M.GPT2CausalLM(backbone, preprocessor))


@pytest.fixture(scope="module")
def text_export(text_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "story" / "1"
    return tfvllm.export(text_model, path, task="generate", max_new_tokens=12)


def controls(**changes):
    values = {
        "max_new_tokens": np.int32(12),
        "temperature": np.float32(0.0),
        "top_k": np.int32(0),
        "top_p": np.float32(1.0),
        "repetition_penalty": np.float32(1.0),
        "no_repeat_ngram": np.int32(0),
        "seed": np.int32(0),
        "stop_strings": np.array([], object),
    }
    return {**values, **changes}


def encoded(texts):
    return np.array([text if isinstance(text, bytes) else text.encode() for text in texts], object)


def test_of_the_warm_up_the_shortest_request_is_run(text_export):
    assert manifest.read(text_export)["warmup"] == {"records": 2, "replayed": 1}
    assert [len(inputs["prompts"]) for _, inputs in warmup.read(text_export)] == [1, 4]


@pytest.mark.thorough
def test_strings_in_strings_out_in_a_fresh_process(text_model, text_export):
    requests = [
        ("serving_default", {"prompts": encoded(PROMPTS)}),
        ("generate", {"prompts": encoded(PROMPTS), **controls()}),
        ("score", {"texts": encoded(PROMPTS)}),
        ("serving_default", {"prompts": encoded([])}),
        ("serving_default", {"prompts": encoded([b"\xff\xfe fox"])}),
        ("generate", {"prompts": encoded(PROMPTS[:1]), **controls(max_new_tokens=np.int32(0))}),
        ("generate", {"prompts": encoded(["quick " * 99 + "fox"]), **controls()}),
    ]
    plain, full, scores, empty, invalid, none, long = parity.run_fresh(text_export, requests)
    text_model.compile(sampler="greedy")
    own = text_model.generate(PROMPTS, max_length=32)  # to the end, or the end token
    for row, prompt in enumerate(PROMPTS):
        text, completion = plain["texts"][row].decode(), plain["completions"][row].decode()
        assert text == prompt + completion or "\ufffd" in text
        if "\ufffd" not in text and "\ufffd" not in own[row]:
            assert own[row].startswith(text)
    np.testing.assert_array_equal(full["completions"], plain["completions"])
    assert set(plain["finish_reasons"]) <= {b"stop", b"length"}
    ids, mask = text_ids(text_model, PROMPTS)
    expected = keras_generate(text_model, ids, mask, 12)
    for row, length in enumerate(full["lengths"]):
        np.testing.assert_array_equal(full["token_ids"][row, :length], expected[row, :length])
    assert scores["log_probs"].shape == ids.shape
    assert (scores["perplexity"] >= 1.0).all()
    assert empty["texts"].shape == (0,)
    assert invalid["texts"][0].decode().startswith("\ufffd\ufffd fox")
    assert none["token_ids"].shape == (1, 0)
    assert none["completions"][0] == b""
    # 32 tokens in all: the start token, the last 30 of the prompt, and one new one.
    np.testing.assert_array_equal(long["lengths"], [1])
    assert long["texts"][0].decode().startswith(" quick quick") or long["texts"][0].decode().startswith("quick")
    assert " quick fox" in long["texts"][0].decode()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names",
    [["generate"], pytest.param(["serving_default", "score", "prefill", "decode"], marks=pytest.mark.slow)],
    ids="-".join,
)
def test_signatures_answer_through_the_c_api(text_export, names):
    signatures = tf.saved_model.load(str(text_export)).signatures
    sampled = controls(temperature=np.float32(0.8), top_k=np.int32(20), stop_strings=encoded(["q"]))
    state = signatures["prefill"](prompts=tf.constant(PROMPTS), max_new_tokens=tf.constant(2))
    caches = {name: value.numpy() for name, value in state.items() if name.startswith(("key_", "value_"))}
    inputs = {
        "serving_default": {"prompts": encoded(PROMPTS)},
        "generate": {"prompts": encoded(PROMPTS), **sampled},
        "score": {"texts": encoded(PROMPTS)},
        "prefill": {"prompts": encoded(PROMPTS), "max_new_tokens": np.int32(2)},
        "decode": {"token_ids": state["token_ids"].numpy(), "positions": state["positions"].numpy(), **caches},
    }
    for name in names:
        same_through_the_c_api(text_export, signatures[name], name, inputs[name])


def same_through_the_c_api(directory, function, name, inputs):
    expected = {key: value.numpy() for key, value in function(**{k: tf.constant(v) for k, v in inputs.items()}).items()}
    found = run(directory, name, inputs)
    assert set(found) == set(expected)
    for key, value in expected.items():
        if value.dtype == object:
            np.testing.assert_array_equal(found[key], value)
        else:
            np.testing.assert_allclose(found[key], value, atol=1e-5)


def text_ids(model, texts):
    tokens = tf.ragged.constant([[1, *model.preprocessor.tokenizer.tokenize(text)] for text in texts], tf.int32)
    return tokens.to_tensor().numpy(), tf.sequence_mask(tokens.row_lengths(), dtype=tf.int32).numpy()


def test_stop_strings_seeds_and_penalties(text_export):
    call = tf.saved_model.load(str(text_export)).signatures["generate"]

    def generate(**changes):
        inputs = {"prompts": encoded(PROMPTS), **controls(**changes)}
        return {name: value.numpy() for name, value in call(**{k: tf.constant(v) for k, v in inputs.items()}).items()}

    free = generate()
    stop = bytes(free["completions"][2].decode()[2:4].encode())
    stopped = generate(stop_strings=encoded([stop, "never seen"]))
    assert stopped["finish_reasons"][2] == b"stop"
    for row in range(len(PROMPTS)):
        before = free["completions"][row].split(stop)[0]
        assert stopped["completions"][row].startswith(before[:1]) or before == b""
        if stop in free["completions"][row]:
            assert stopped["completions"][row] == before
            assert stopped["texts"][row].decode() == PROMPTS[row] + before.decode()
    hot = generate(temperature=np.float32(1.0), seed=np.int32(5))
    again = generate(temperature=np.float32(1.0), seed=np.int32(5))
    other = generate(temperature=np.float32(1.0), seed=np.int32(6))
    np.testing.assert_array_equal(hot["token_ids"], again["token_ids"])
    assert (hot["token_ids"] != other["token_ids"]).any()
    np.testing.assert_array_equal(
        generate(temperature=np.float32(1.0), top_p=np.float32(0.0))["token_ids"], free["token_ids"]
    )
    np.testing.assert_array_equal(
        generate(temperature=np.float32(1.0), top_k=np.int32(1))["token_ids"], free["token_ids"]
    )
    once = generate(no_repeat_ngram=np.int32(1))
    for row in range(len(PROMPTS)):
        tokens = once["token_ids"][row, : once["lengths"][row]]
        assert len(set(tokens)) == len(tokens)


@pytest.mark.thorough
def test_optional_inputs_have_defaults_for_a_server(text_export):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        graph = tf.compat.v1.saved_model.load(session, ["serve"], str(text_export))
        signature = graph.signature_def["generate"]
        assert set(signature.defaults) == set(controls())
        fetches = {name: info.name for name, info in signature.outputs.items()}
        found = session.run(fetches, {signature.inputs["prompts"].name: encoded(PROMPTS)})
        plain = graph.signature_def["serving_default"]
        greedy = session.run(plain.outputs["completions"].name, {plain.inputs["prompts"].name: encoded(PROMPTS)})
    np.testing.assert_array_equal(found["completions"], greedy)


@pytest.mark.thorough
def test_streaming_gives_the_same_text(text_export):
    signatures = tf.saved_model.load(str(text_export)).signatures
    prompts_ = tf.constant(PROMPTS)
    whole = signatures["serving_default"](prompts=prompts_)
    state = signatures["prefill"](prompts=prompts_, max_new_tokens=tf.constant(12))
    pieces = [state["piece_bytes"].numpy()]
    for _ in range(11):
        caches = {name: value for name, value in state.items() if name.startswith(("key_", "value_"))}
        state = signatures["decode"](token_ids=state["token_ids"], positions=state["positions"], **caches)
        pieces.append(state["piece_bytes"].numpy())
    for row, reason in enumerate(whole["finish_reasons"].numpy()):
        if reason == b"length":
            text = b"".join(piece[row] for piece in pieces).decode(errors="replace")
            assert text == whole["completions"][row].numpy().decode()


def test_only_stock_ops_and_one_copy_of_the_weights(text_model, text_export):
    proto = protos.read_proto(text_export).meta_graphs[0]
    nodes = [*proto.graph_def.node, *(n for f in proto.graph_def.library.function for n in f.node_def)]
    assert not sorted(
        {node.op for node in nodes if node.op.startswith("_") or "Xla" in node.op or "Mutable" in node.op}
    )
    assert not any(
        "_XlaMustCompile" in f.attr and f.attr["_XlaMustCompile"].b for f in proto.graph_def.library.function
    )
    largest = max(len(node.attr["value"].tensor.tensor_content) for node in nodes if node.op == "Const")
    assert largest < 100_000
    reader = tf.train.load_checkpoint(str(text_export / "variables" / "variables"))
    shapes = reader.get_variable_to_shape_map()
    floats = [name for name, dtype in reader.get_variable_to_dtype_map().items() if dtype == tf.float32]
    assert sum(int(np.prod(shapes[name])) for name in floats) == text_model.count_params()
    manifest = json.loads((text_export / "assets.extra" / "tfvllm.json").read_text())
    assert manifest["family"] == "gpt2"
    assert manifest["parameters"] == text_model.count_params()
    assert manifest["measured_error"]["max_abs_error"] < 1e-3


def test_signatures_share_the_large_pieces(text_export):
    graph = protos.read_proto(text_export).meta_graphs[0].graph_def
    nodes = [node for function in graph.library.function for node in function.node_def]
    layers = 2
    # One step for both loops and for `decode`.
    assert sum(node.op == "InplaceUpdate" for node in nodes) == 2 * layers
    # Beside the step's: one attention, whole and by four parts, for all blocks of prompts and of `score`; and the last
    # block's of one prefill for three signatures.
    assert sum(node.op in ("BatchMatMulV2", "BatchMatMulV3") for node in nodes) == 2 * layers + 2 * (1 + 4) + 2
    # What TensorFlow prepares once, not once a call: the attention to prompts and the tokenizer.
    apart = [f.signature.name for f in graph.library.function if f.attr["_noinline"].b]
    assert sorted(name.removeprefix("__inference_").rsplit("_", 1)[0] for name in apart) == [
        "attend_by_parts",
        "encode",
    ]


def test_caches_change_rows_in_one_copy():
    """Beams do at every step; only caches that grow are copied once more."""

    def copies(wider):
        with tf.Graph().as_default() as graph:
            capacity, rows = tf.constant(16), tf.constant([1, 0])
            caches = [tf.zeros([2 * 3 * 16, 4])] * 2
            grow_caches(caches, [(3, 4)], capacity, capacity if wider is None else tf.constant(wider), rows)
            return [sum(op.type == kind for op in graph.get_operations()) for kind in ("GatherV2", "Pad")]

    assert copies(None) == [2, 0]
    assert copies(32) == [2, 2]
    cache = tf.reshape(tf.range(2 * 3 * 4 * 5, dtype=tf.float32), [-1, 5])
    (grown,) = grow_caches([cache], [(3, 5)], tf.constant(4), tf.constant(6), tf.constant([1]))
    grown = tf.reshape(grown, [1, 3, 6, 5]).numpy()
    np.testing.assert_array_equal(grown[:, :, :4], tf.reshape(cache, [2, 3, 4, 5]).numpy()[1:])
    assert not grown[:, :, 4:].any()


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_ids_interface_is_the_one_in_the_contract(tmp_path, precision):
    model = build(gpt2)
    path = tfvllm.export(model, tmp_path / "ids", task="generate", max_length=48, precision=precision, warmup=False)
    ids, mask = prompts([3, 9, 5])
    call = tf.saved_model.load(str(path)).signatures["serving_default"]
    found = call(token_ids=tf.constant(ids), padding_mask=tf.constant(mask), max_new_tokens=tf.constant(10))
    assert set(found) == {"token_ids", "lengths"}
    assert found["token_ids"].shape == (3, 10) and found["token_ids"].dtype == tf.int32
    np.testing.assert_array_equal(found["lengths"], [10, 10, 10])
    if precision == "float32":
        np.testing.assert_array_equal(found["token_ids"], keras_generate(model, ids, mask, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 100}, "positions for 64 tokens. Pass max_length=64"),
        ({"precision": "int8"}, "exports float32 and bfloat16; got precision='int8'"),
        ({"target": "gpu"}, "target: expected one of portable, onednn, found 'gpu'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        tfvllm.export(build(gpt2), tmp_path / "x", task="generate", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_translate_text(tmp_path):
    tokens = tokenizer(M.BartTokenizer, ("<s>", "<pad>", "</s>"))
    backbone = M.BartBackbone(tokens.vocabulary_size(), 2, 4, 32, 64, max_sequence_length=32)
    preprocessor = M.BartSeq2SeqLMPreprocessor(tokens, encoder_sequence_length=16, decoder_sequence_length=14)
    model = build(lambda: M.BartSeq2SeqLM(backbone, preprocessor))
    path = tfvllm.export(
        model, tmp_path / "t", task="translate", beams=3, length_penalty=0.0, check="fresh", warmup=False
    )
    signatures = tf.saved_model.load(str(path)).signatures
    texts = ["a quick fox", "", "\u4f60", "quick " * 20]
    sources = preprocessor.generate_preprocess(texts)
    ids, mask = np.asarray(sources["encoder_token_ids"]), np.asarray(sources["encoder_padding_mask"]).astype(np.int32)
    neutral = {name: value for name, value in controls(max_new_tokens=np.int32(12)).items() if name != "stop_strings"}
    found = signatures["generate"](texts=tf.constant(texts), **{k: tf.constant(v) for k, v in neutral.items()})
    expected = keras_translate(model, ids, mask, (2, 0), 12)
    for row, length in enumerate(found["lengths"].numpy()):
        np.testing.assert_array_equal(found["token_ids"].numpy()[row, :length], expected[row, :length])
    beam = signatures["beam"](texts=tf.constant(texts), max_new_tokens=tf.constant(12), length_penalty=tf.constant(0.0))
    plain = signatures["serving_default"](texts=tf.constant(texts))
    np.testing.assert_array_equal(plain["translations"], beam["translations"])
    targets = [text.decode() for text in beam["translations"].numpy()]
    if all("\ufffd" not in target for target in targets):
        assert signatures["score"](texts=tf.constant(texts), targets=tf.constant(targets))["perplexity"].shape == (4,)
    assert signatures["serving_default"](texts=tf.constant([], tf.string))["translations"].shape == (0,)
    same_through_the_c_api(path, signatures["serving_default"], "serving_default", {"texts": encoded(texts)})
    scored = {"texts": encoded(texts), "targets": encoded(["fox"] * 4)}
    same_through_the_c_api(path, signatures["score"], "score", scored)


@pytest.mark.thorough
def test_translate_ids_through_the_c_api(tmp_path):
    model = M.BartSeq2SeqLM(M.BartBackbone(VOCABULARY, 1, 2, 16, 32, max_sequence_length=16))
    options = {"max_length": 10, "start_token_ids": [2, 0], "warmup": False}
    path = tfvllm.export(build(lambda: model), tmp_path / "t", task="translate", **options)
    ids, mask = prompts([3, 7], low=3)
    inputs = {"token_ids": ids, "padding_mask": mask, "max_new_tokens": np.int32(6)}
    function = tf.saved_model.load(str(path)).signatures["serving_default"]
    same_through_the_c_api(path, function, "serving_default", inputs)
    found = function(**{name: tf.constant(value) for name, value in inputs.items()})["token_ids"]
    np.testing.assert_array_equal(found, keras_translate(model, ids, mask, (2, 0), 6))


def test_translate_needs_a_start(tmp_path):
    with pytest.raises(InputError, match="pass start_token_ids"):
        tfvllm.export(build(bart), tmp_path / "x", task="translate")
    with pytest.raises(InputError, match="has no encoder"):
        tfvllm.export(build(gpt2), tmp_path / "x", task="translate")
    with pytest.raises(InputError, match="sequence to sequence"):
        tfvllm.export(build(bart), tmp_path / "x", task="generate")


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
def test_embeddings_do_not_depend_on_padding(pooling):
    outputs = tf.random.normal([3, 5, 4])
    mask = tf.sequence_mask([5, 2, 0], 5)
    found = pool(outputs, mask, pooling).numpy()
    for row, length in enumerate([5, 2]):
        real = outputs[row, :length].numpy()
        expected = {"mean": real.mean(0), "max": real.max(0), "first": real[0], "last": real[-1]}[pooling]
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    np.testing.assert_array_equal(found[2], np.zeros(4))


@pytest.mark.thorough
def test_embed_text_and_ids(tmp_path):
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "film", "fine", "##s"]
    tokens = M.BertTokenizer(vocabulary)
    backbone = M.BertBackbone(len(vocabulary), 2, 2, 16, 32, max_sequence_length=24)
    preprocessor = M.BertTextClassifierPreprocessor(tokens, sequence_length=24)
    path = tfvllm.export(backbone, tmp_path / "e", task="embed", preprocessor=preprocessor, check="fresh")
    call = tf.saved_model.load(str(path)).signatures["serving_default"]
    texts = ["a fine film", "films", ""]
    found = call(text=tf.constant(texts))["embeddings"].numpy()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    features = preprocessor(texts)
    outputs = backbone(features)["sequence_output"].numpy()
    weights = np.asarray(features["padding_mask"], np.float32)[..., None]
    expected = (outputs * weights).sum(1) / weights.sum(1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alone = call(text=tf.constant(["films"]))["embeddings"].numpy()
    np.testing.assert_allclose(alone[0], found[1], atol=1e-5)
    same_through_the_c_api(path, call, "serving_default", {"text": encoded(texts)})

    path = tfvllm.export(backbone, tmp_path / "i", task="embed", normalize=False, pooling="first", warmup=False)
    call = tf.saved_model.load(str(path)).signatures["serving_default"]
    ids = {name: tf.cast(value, tf.int32) for name, value in features.items() if name != "segment_ids"}
    np.testing.assert_allclose(call(**ids)["embeddings"], outputs[:, 0], atol=1e-5)
    with pytest.raises(InputError, match="pooling must be one of mean, max, first, last"):
        tfvllm.export(backbone, tmp_path / "x", task="embed", pooling="median")
    with pytest.raises(InputError, match="expected a text backbone"):
        tfvllm.export(keras.Sequential([keras.Input([3]), keras.layers.Dense(1)]), tmp_path / "x", task="embed")
    assert VOCABULARY == 97
