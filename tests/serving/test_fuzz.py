"""The REST parsers on bytes of any kind: a request, or INVALID_ARGUMENT; never anything else, never a wrong dtype.

TFVLLM_FUZZ_EXAMPLES sets how many inputs each property tries (default 500). Beside them, 100,000 cheap mutations of
good requests, always the same ones, and 100,000 inputs that Atheris finds by the code they reach (fuzz_rest.py).
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tfvllm.serving import examples, tensors
from tfvllm.serving.servable import CLASSIFY, Signature, Spec, numpy_dtype
from tfvllm.serving.status import ServingError, invalid

many = settings(
    max_examples=int(os.environ.get("TFVLLM_FUZZ_EXAMPLES", "500")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)

DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "int32", "int64", "uint8", "uint32", "bool", "string"]
SIGNATURES = {
    "": Signature("serving_default", "", {"text": Spec("t:0", "string", (-1,))}, {}),
    "two": Signature("two", "", {"a": Spec("a:0", "float32", (-1, 3)), "b": Spec("b:0", "int32", (-1,))}, {}),
    **{dtype: Signature(dtype, "", {"x": Spec("x:0", dtype, None)}, {}) for dtype in DTYPES},
    "scalar": Signature("scalar", "", {"text": Spec("t:0", "string", (-1,)), "n": Spec("n:0", "int32", ())}, {}),
    "classify": Signature("classify", CLASSIFY, {"inputs": Spec("i:0", "string", (-1,))}, {}),
}


def find(name: str) -> Signature:
    if name not in SIGNATURES:
        raise invalid(f"no signature {name!r}")
    return SIGNATURES[name]


def check_predict(body: bytes) -> str:
    """Parses `body`; returns what came of it."""
    try:
        parsed = tensors.parse_predict(body, find)
    except ServingError as error:
        assert error.code == "INVALID_ARGUMENT"
        assert error.message
        assert len(error.message) < 2000
        json.loads(tensors.error_body(error.message))
        return "refused"
    signature = find(parsed.signature_name)
    assert set(parsed.inputs) == set(signature.inputs)
    for name, array in parsed.inputs.items():
        assert array.dtype == numpy_dtype(signature.inputs[name].dtype)
        if array.dtype == object:
            assert all(type(value) is bytes for value in array.ravel())
        json.loads(tensors.dumps(tensors.jsonable(array, name)))  # and it can be written again
    return "accepted"


def check_examples(body: bytes) -> str:
    try:
        parsed = examples.parse_examples(body, "classify")
    except ServingError as error:
        assert error.code == "INVALID_ARGUMENT"
        return "refused"
    from tensorflow.core.example import example_pb2

    assert parsed.examples
    for row in parsed.examples:
        example_pb2.Example.FromString(row)
    return "accepted"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-200, 300)
    | st.floats()
    | st.text(max_size=8)
    | st.builds(lambda text: {"b64": text}, st.text("AaZz09+/=-_*", max_size=9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b", "x", "text", "n", "b64"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)
numbers = st.integers(-300, 2**33) | st.floats(width=32) | st.booleans()
grids = st.integers(0, 4).flatmap(
    lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4)
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "instances": json_values | st.lists(numbers, min_size=1) | grids,
        "inputs": json_values | grids | st.lists(st.text(max_size=4)),
        "signature_name": st.sampled_from([*SIGNATURES, "nope", 3]) | json_values,
        "examples": json_values | st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), max_size=3),
        "context": json_values,
    },
)
fitting = st.one_of(
    st.builds(lambda rows: {"instances": rows}, st.lists(st.text(max_size=6), min_size=1, max_size=4)),
    st.builds(
        lambda rows: {"signature_name": "two", "instances": [{"a": a, "b": b} for a, b in rows]},
        st.lists(
            st.tuples(st.lists(st.floats(width=32), min_size=3, max_size=3), st.integers(-(2**31), 2**31 - 1)),
            min_size=1,
            max_size=3,
        ),
    ),
    st.builds(
        lambda texts, n: {"signature_name": "scalar", "inputs": {"text": texts, "n": n}},
        st.lists(st.text(max_size=6), max_size=3),
        st.integers(-5, 5),
    ),
)


@many
@given(st.binary(max_size=200))
@example(b'{"instances": ["\\ud800"]}')
@example(b'{"inputs": [[]], "signature_name": "float32"}')
@example(b'{"inputs": [[[]], []], "signature_name": "float32"}')
@example(b'{"inputs": 1e400, "signature_name": "bfloat16"}')
@example(b"[" * 100_000)
@example(b'{"inputs":' * 2000)
@example(b'{"instances": [' + b"1" * 4400 + b"]}")
def test_any_bytes(body):
    check_predict(body)
    check_examples(body)


@many
@given(requests)
def test_any_json(document):
    try:
        body = json.dumps(document).encode()
    except UnicodeEncodeError:
        return
    check_predict(body)
    check_examples(body)


@many
@given(fitting, st.data())
def test_mutated_requests(document, data):
    body = bytearray(json.dumps(document).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        change = data.draw(st.sampled_from(["cut", "insert", "set", "repeat"]))
        if change == "cut":
            del body[at : at + data.draw(st.integers(1, 5))]
        elif change == "insert":
            body[at:at] = data.draw(
                st.sampled_from([b"[", b"]", b"{", b"}", b'"', b",", b"\\u", b"\xff", b"1e9", b"NaN"])
            )
        elif change == "set" and at < len(body):
            body[at] = data.draw(st.integers(0, 255))
        else:
            body[at:at] = body[max(0, at - 10) : at]
    check_predict(bytes(body))


@many
@given(fitting)
def test_fitting_requests_are_accepted(document):
    try:
        body = json.dumps(document).encode()
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert check_predict(body) == "accepted"


CORPUS = [
    b'{"instances": ["good", {"b64": "Z29vZA=="}]}',
    b'{"inputs": {"text": ["a", "\\u4f60\\ud83d\\ude00"]}}',
    b'{"signature_name": "two", "instances": [{"a": [1, 2.5, -3e2], "b": 4}, {"a": [0, 0, NaN], "b": -1}]}',
    b'{"signature_name": "two", "inputs": {"a": [[1, 2, 3], [4, 5, 6]], "b": [1, 2]}}',
    b'{"signature_name": "scalar", "inputs": {"text": [], "n": 7}}',
    b'{"signature_name": "int8", "inputs": [[[1, -128], [127, 0]], [[2, 3], [4, 5]]]}',
    b'{"signature_name": "bool", "inputs": [true, false]}',
    b'{"signature_name": "bfloat16", "instances": [1e-3, Infinity]}',
    b'{"signature_name": "classify", "context": {"c": 1}, "examples": [{"x": [1.5, 2], "s": "t", "e": []}, {}]}',
]
TOKENS = [
    *b'[]{},:"0-',
    b"null",
    b"true",
    b"1e400",
    b"9" * 30,
    b'"b64"',
    b"\\ud800",
    b"\xff",
    b'"instances":',
    b"[" * 50,
]


@pytest.mark.slow
def test_a_hundred_thousand_mutations():
    generator, outcomes = random.Random(20), Counter()
    for _ in range(100_000):
        body = bytearray(generator.choice(CORPUS))
        for _ in range(generator.choice((1, 1, 2, 3, 8))):
            at = generator.randrange(len(body) + 1)
            kind = generator.randrange(5)
            if kind == 0:
                del body[at : at + generator.randrange(1, 6)]
            elif kind == 1:
                token = generator.choice(TOKENS)
                body[at:at] = bytes([token]) if isinstance(token, int) else token
            elif kind == 2 and at < len(body):
                body[at] = generator.randrange(256)
            elif kind == 3:
                other = generator.choice(CORPUS)
                body[at:] = other[generator.randrange(len(other)) :]
            else:
                body[at:at] = body[max(0, at - generator.randrange(1, 20)) : at]
        outcomes[check_predict(bytes(body)), check_examples(bytes(body))] += 1
    assert sum(outcomes.values()) == 100_000
    assert outcomes["refused", "refused"] > 50_000
    assert outcomes["accepted", "refused"] > 1_000
    assert outcomes["refused", "accepted"] > 10


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
def test_a_hundred_thousand_inputs_guided_by_coverage(tmp_path):
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for i, body in enumerate(CORPUS):
        (seeds / str(i)).write_bytes(body)
    command = [sys.executable, "-m", "tests.serving.fuzz_rest", "-runs=100000", "-seed=7", "-max_len=400"]
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/", str(seeds)], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 100000" in done.stderr
    assert len(list(seeds.iterdir())) > 3 * len(CORPUS)  # inputs that reached code no other had


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "bool"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_round_trip(dtype, data):
    shape = data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    element = {
        "float32": st.floats(width=32),
        "float64": st.floats(),
        "int32": st.integers(-(2**31), 2**31 - 1),
        "bool": st.booleans(),
    }[dtype]
    count = int(np.prod(shape))
    array = np.array(data.draw(st.lists(element, min_size=count, max_size=count)), dtype).reshape(shape)
    body = tensors.dumps({"inputs": tensors.jsonable(array, "x"), "signature_name": dtype})
    np.testing.assert_array_equal(tensors.parse_predict(body, find).inputs["x"], array)
