"""Tensors and results, and the JSON bodies that are written of them.

From tensorflow_serving/util/json_tensor_test.cc.
"""

INF, NAN = float("inf"), float("nan")
SIX = [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 0], [1, 2]]]
SEVERAL = {
    "int_tensor": ("int32", SIX),
    "str_tensor": ("string", [[b"foo", b"bar"], [b"baz", b"bat"]]),
    "float_tensor": ("float32", [[1.0], [2.0]]),
    "double_scalar_tensor": ("float64", [8.0, 9.0]),
    "str_tensor_bytes": ("string", [[b"hello", b"world"], [b"tf", b"serving"]]),
}
HELLO = [[{"b64": "aGVsbG8="}, {"b64": "d29ybGQ="}], [{"b64": "dGY="}, {"b64": "c2VydmluZw=="}]]

# (case, (dtype, values) by output, format, the answer; its numbers as text where the test compares them so)
WRITTEN = [
    ("FromJsonSingleTensor 1", {"int_tensor": ("int32", SIX)}, "row", {"predictions": SIX}),
    ("FromJsonSingleTensor 2", {"int_tensor": ("int32", SIX)}, "column", {"outputs": SIX}),
    (
        "FromJsonSingleScalarTensor 1",
        {"int_tensor": ("int32", [1, 2, 3, 4, 5])},
        "row",
        {"predictions": [1, 2, 3, 4, 5]},
    ),
    (
        "FromJsonSingleScalarTensor 2",
        {"int_tensor": ("int32", [1, 2, 3, 4, 5])},
        "column",
        {"outputs": [1, 2, 3, 4, 5]},
    ),
    (
        "FromJsonSingleBytesTensor",
        {"str_tensor_bytes": ("string", [[b"hello", b"world"], [b"tf", b"serving"]])},
        "row",
        {"predictions": HELLO},
    ),
    (
        "FromJsonSingleFloatTensorSixDigitPrecision",
        {"float_tensor": ("float32", [[9000000, 999999, 0.5], [0.0003, 0.00003, 555557.5]])},
        "row",
        {"predictions": [["9e+06", "999999.0", "0.5"], ["0.0003", "3e-05", "555557.5"]]},
    ),
    (
        "FromJsonSingleFloatTensorNonFinite",
        {"float_tensor": ("float32", [[NAN, INF], [3, -INF]])},
        "row",
        {"predictions": [["NaN", "Infinity"], ["3.0", "-Infinity"]]},
    ),
    (
        "FromJsonMultipleNamedTensors 1",
        SEVERAL,
        "row",
        {
            "predictions": [
                {
                    "double_scalar_tensor": 8.0,
                    "float_tensor": [1.0],
                    "int_tensor": SIX[0],
                    "str_tensor": ["foo", "bar"],
                    "str_tensor_bytes": HELLO[0],
                },
                {
                    "double_scalar_tensor": 9.0,
                    "float_tensor": [2.0],
                    "int_tensor": SIX[1],
                    "str_tensor": ["baz", "bat"],
                    "str_tensor_bytes": HELLO[1],
                },
            ]
        },
    ),
    (
        "FromJsonMultipleNamedTensors 2",
        SEVERAL,
        "column",
        {
            "outputs": {
                "double_scalar_tensor": [8.0, 9.0],
                "float_tensor": [[1.0], [2.0]],
                "int_tensor": SIX,
                "str_tensor": [["foo", "bar"], ["baz", "bat"]],
                "str_tensor_bytes": HELLO,
            }
        },
    ),
    ("FromJsonSingleZeroBatchTensor", {"int_tensor": ("int32", (0, 2))}, "row", {"predictions": []}),
    (
        "FromJsonMultipleZeroBatchTensors",
        {"str_tensor": ("string", (0, 1, 2)), "float_tensor": ("float32", (0, 3, 4))},
        "row",
        {"predictions": []},
    ),
]

# (case, (dtype, values) by output, format, words of the INVALID_ARGUMENT); a tuple of values is a shape without any
UNWRITABLE = [
    ("FromJsonSingleTensorErrors 1", {}, "row", "empty tensor map"),
    ("FromJsonSingleTensorErrors 2", {"tensor": ("complex64", [1.0, 2.0])}, "row", "tensor type: complex64"),
    ("FromJsonSingleTensorErrors 3", {"tensor": ("int32", 1)}, "row", "no shape information"),
    (
        "FromJsonMultipleNamedTensorsErrors",
        {"int_tensor": ("int32", [[1, 2, 3], [4, 5, 6]]), "str_tensor": ("string", [[b"foo", b"bar", b"baz"]])},
        "row",
        "inconsistent batch size",
    ),
    (
        "FromJsonMultipleZeroBatchTensorsErrors",
        {"int_tensor": ("int32", (0, 2)), "str_tensor": ("string", [[b"foo", b"bar"]])},
        "row",
        "inconsistent batch size",
    ),
]

# (case, results of :classify or :regress, the answer; its numbers as text where the test compares them so)
RESULTS = [
    (
        "JsonFromClassificationResult",
        [[("car", 0.2), ("bike", 0.7), ("bus", 0.1)], [("car", 0.7), ("bike", 0.1), ("bus", 0.2)]],
        {
            "results": [
                [["car", 0.2], ["bike", 0.7], ["bus", 0.1]],
                [["car", 0.7], ["bike", 0.1], ["bus", 0.2]],
            ]
        },
    ),
    ("JsonFromRegressionResult", [0.2, 0.9, 1.0], {"results": [0.2, 0.9, 1.0]}),
    (
        "JsonFromRegressionResultWithNonFinite",
        [0.2, INF, 1.0, -INF, NAN],
        {"results": ["0.2", "Infinity", "1.0", "-Infinity", "NaN"]},
    ),
]

# (case, the message, the body)
ERRORS = [
    ("StatusError 1", 'Bad key: "key"', {"error": 'Bad key: "key"'}),
    ("StatusError 2", "Bad key: 'key'", {"error": "Bad key: 'key'"}),
]
