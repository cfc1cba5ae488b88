import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text as text

from tests.rules.checks import check, f32
from tfvllm.rules.proven_assertions import DropProvenAssertions

CLEAN = ["DropProvenAssertions", "DropIdentities", "FoldConstants", "MergeDuplicates", "DeleteDead"]
STRINGS = [tf.TensorSpec([None], tf.string, "x")]
TEXTS = [
    [np.array([b"a fine film", b"", "很好 的".encode()], object)],
    [np.array([], object)],
    [np.array([b" "], object)],
]


def ragged(tokens):
    """What Keras preprocessing does with tokens: the checks of ragged tensors are behind each of these."""
    partition = tf.RaggedTensor.from_row_splits(tokens.flat_values, tokens.row_splits)
    return partition.row_lengths(), partition.to_tensor(b"" if tokens.dtype == tf.string else 0)


def assertions(checked):
    return [n for n in checked.ops() if n.op in ("Assert", "If")]


def run(function, specs=STRINGS, fires=None, **more):
    return check(function, specs, CLEAN, fires, samples=TEXTS if specs is STRINGS else (), generated=False, **more)


@pytest.mark.thorough
def test_row_splits_of_a_tokenizer():
    c = run(lambda x: ragged(text.regex_split(x, " ")))
    assert c.rewriter.counts["DropProvenAssertions"] >= 3
    assert not assertions(c)


def test_splits_of_splits():
    vocabulary = ["a", "fine", "film", "##s", "[UNK]", "很", "好"]
    pieces = text.FastWordpieceTokenizer(vocabulary, unknown_token="[UNK]", no_pretokenization=True)

    def f(x):
        words = text.case_fold_utf8(text.regex_split(x, " "))
        found = pieces.tokenize(words)
        return ragged(found.merge_dims(-2, -1))

    c = run(f)
    assert c.rewriter.counts["DropProvenAssertions"] >= 6
    assert not assertions(c)


def test_ranges():
    c = check(
        lambda n: ragged(tf.ragged.range(n)),
        [tf.TensorSpec([None], tf.int32)],
        CLEAN,
        None,
        samples=[[np.array([3, 0, 2], np.int32)], [np.zeros(0, np.int32)]],
        generated=False,
    )
    assert not assertions(c)


def test_splits_that_come_from_outside_are_checked():
    def f(values, splits):
        return tf.RaggedTensor.from_row_splits(values, splits).to_tensor()

    specs = [tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.int64)]
    good = [np.arange(5, dtype=np.int32), np.array([0, 2, 5], np.int64)]
    c = check(f, specs, CLEAN, {"DropProvenAssertions": 0}, samples=[good], generated=False)
    assert len(assertions(c)) == 3


def test_splits_of_other_values_are_checked():
    """Splits of one tokenizer put to the values of another: only what the splits alone promise is proven."""

    def f(x):
        words, clauses = text.regex_split(x, " "), text.regex_split(x, "[ ,]")
        return tf.RaggedTensor.from_row_splits(clauses.flat_values, words.row_splits).row_lengths()

    c = check(f, STRINGS, CLEAN, None, samples=TEXTS, generated=False)
    assert len(assertions(c)) == 1


def test_what_users_assert_stays():
    def f(x):
        tf.debugging.assert_less(x, 100.0)
        with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(x)[0], 2)]):
            return x * 2.0

    c = check(f, [f32(None)], CLEAN, {"DropProvenAssertions": 0}, samples=[[np.ones(2, np.float32)]], generated=False)
    assert len(assertions(c)) == 2


def test_nan_is_not_equal_to_itself():
    def f(x):
        tf.debugging.Assert(tf.reduce_all(tf.equal(x, x)), [x])
        return x + 1.0

    c = check(f, [f32(None)], DropProvenAssertions(), 0, samples=[[np.ones(2, np.float32)]], generated=False)
    assert len(assertions(c)) == 1
    whole = check(
        lambda x: (tf.debugging.Assert(tf.reduce_all(tf.equal(x, x)), [x]), x + 1)[1],
        [tf.TensorSpec([None], tf.int32)],
        DropProvenAssertions(),
        1,
        samples=[[np.ones(2, np.int32)]],
        generated=False,
    )
    assert not assertions(whole)


def test_what_came_before_an_assertion_still_comes_before_what_follows():
    counter = tf.Variable(0)

    def f(x):
        with tf.control_dependencies([counter.assign_add(1)]):
            check_ = tf.debugging.Assert(tf.reduce_all(tf.equal(x, x)), [x])
        with tf.control_dependencies([check_]):
            return x + counter.read_value()

    c = check(f, [tf.TensorSpec([None], tf.int32)], DropProvenAssertions(), 1, samples=[], generated=False)
    (read,) = [n for n in c.graph.live() if n.op == "ReadVariableOp" and n.controls]
    assert [n.op for n in read.controls] == ["AssignAddVariableOp"]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_bisection_may_stop_it_anywhere(limit):
    from tfvllm.graph import importer
    from tfvllm.graph.rewriter import Rewriter
    from tfvllm.rules import pipeline

    concrete = tf.function(lambda x: ragged(text.regex_split(x, " "))).get_concrete_function(*STRINGS)
    rewriter = Rewriter(importer.from_concrete(concrete), limit=limit)
    rewriter.run([s for s in pipeline() if s.name == "assertions"])
    assert len(rewriter.fired) <= limit
    rewriter.graph.check()
