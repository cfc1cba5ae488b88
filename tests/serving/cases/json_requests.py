"""Bodies of :predict, :classify and :regress requests, and the tensors or tf.Examples that are read from them.

From tensorflow_serving/util/json_tensor_test.cc.
"""

INF, NAN = float("inf"), float("nan")
ONE = {"default": "int32"}
NAMED = {"int_tensor": "int32", "str_tensor": "string"}
PAIRS = [[1, 2], [3, 4], [5, 6]]
LARGEST, SMALLEST = 1.7976931348623157e308, 2.2250738585072014e-308  # of float64

# (case, inputs of the signature, body, signature named in it, format, values by input)
READ = [
    ("SingleUnnamedTensor", ONE, '{"instances": [[1,2],[3,4],[5,6]]}', "", "row", {"default": PAIRS}),
    (
        "DeeplyNestedWellFormed",
        ONE,
        '{"instances":[1], "nested":' + "[" * 500_000 + "]" * 500_000 + "}",
        "",
        "row",
        {"default": [1]},
    ),
    (
        "MixedInputForFloatTensor",
        {"default": "float32"},
        '{"instances": [1, 2.0, 3, 4, 5.003, 0.007, 0.0]}',
        "",
        "row",
        {"default": [1, 2.0, 3, 4, 5.003, 0.007, 0.0]},
    ),
    (
        "MixedInputForDoubleTensor",
        {"default": "float64"},
        '{"instances": [1.0, 2, 3, 4, 0.662, 0, 0.0]}',
        "",
        "row",
        {"default": [1.0, 2, 3, 4, 0.662, 0, 0.0]},
    ),
    (
        "FloatTensorWithPrecisionLoss 1",
        {"default": "float32"},
        '{"instances": [1435774380]}',
        "",
        "row",
        {"default": [1435774380]},
    ),
    (
        "FloatTensorWithPrecisionLoss 2",
        {"default": "float32"},
        '{"instances": [1435774380.0]}',
        "",
        "row",
        {"default": [1435774380.0]},
    ),
    (
        "FloatTensorThatExceedsMaxReturnsInf 1",
        {"default": "float32"},
        f'{{"instances": [{LARGEST}]}}',
        "",
        "row",
        {"default": [INF]},
    ),
    (
        "FloatTensorThatExceedsMaxReturnsInf 2",
        {"default": "float32"},
        f'{{"instances": [{-LARGEST}]}}',
        "",
        "row",
        {"default": [-INF]},
    ),
    (
        "FloatTensorThatExceedsMinReturnsZero 1",
        {"default": "float32"},
        f'{{"instances": [{SMALLEST}]}}',
        "",
        "row",
        {"default": [0.0]},
    ),
    (
        "FloatTensorThatExceedsMinReturnsZero 2",
        {"default": "float32"},
        f'{{"instances": [{-SMALLEST}]}}',
        "",
        "row",
        {"default": [-0.0]},
    ),
    (
        "SingleUnnamedTensorWithSignature",
        ONE,
        '{"signature_name": "predict_images", "instances": [[1,2]]}',
        "predict_images",
        "row",
        {"default": [[1, 2]]},
    ),
    ("TensorFromNonNullTerminatedBuffer", ONE, '{"instances": [[1,2],[3,4],[5,6]]}', "", "row", {"default": PAIRS}),
    (
        "SingleUnnamedTensorBase64Scalars",
        {"default": "string"},
        '{"instances": [{"b64": "aGVsbG8="}, {"b64": "d29ybGQ="}]}',
        "",
        "row",
        {"default": [b"hello", b"world"]},
    ),
    (
        "SingleUnnamedTensorBase64Lists",
        {"default": "string"},
        '{"instances": [[{"b64": "aGVsbG8="}], [{"b64": "d29ybGQ="}]]}',
        "",
        "row",
        {"default": [[b"hello"], [b"world"]]},
    ),
    (
        "SingleNamedTensorBase64",
        {"default": "string"},
        '{"instances": [{"default": [[{"b64": "aGVsbG8="}], [{"b64": "d29ybGQ="}]]}]}',
        "",
        "row",
        {"default": [[[b"hello"], [b"world"]]]},
    ),
    (
        "MultipleNamedTensor",
        {**NAMED, "float_tensor": "float32", "dbl_tensor": "float64"},
        """{"instances": [
            {"int_tensor": [[1,2],[3,4],[5,6]], "str_tensor": ["foo", "bar"], "float_tensor": [1.0, NaN],
             "dbl_tensor": [NaN]},
            {"int_tensor": [[7,8],[9,0],[1,2]], "str_tensor": ["baz", "bat"], "float_tensor": [2.0, Infinity],
             "dbl_tensor": [2.0]}]}""",
        "",
        "row",
        {
            "int_tensor": [PAIRS, [[7, 8], [9, 0], [1, 2]]],
            "str_tensor": [[b"foo", b"bar"], [b"baz", b"bat"]],
            "float_tensor": [[1.0, NAN], [2.0, INF]],
            "dbl_tensor": [[NAN], [2.0]],
        },
    ),
    (
        "SingleUnnamedTensorColumnarFormat 1",
        {"int_tensor": "int32"},
        '{"inputs": {"int_tensor": [[[1,2],[3,4],[5,6]]]}}',
        "",
        "column",
        {"int_tensor": [PAIRS]},
    ),
    (
        "SingleUnnamedTensorColumnarFormat 2",
        {"int_tensor": "int32"},
        '{"inputs": [[[1,2],[3,4],[5,6]]]}',
        "",
        "column",
        {"int_tensor": [PAIRS]},
    ),
    (
        "MultipleNamedTensorColumnarFormat",
        {**NAMED, "bin_tensor": "string"},
        """{"inputs": {"int_tensor": [[[1,2],[3,4],[5,6]]], "str_tensor": ["foo", "bar"],
                       "bin_tensor": {"b64": "aGVsbG8="}}}""",
        "",
        "column",
        {"int_tensor": [PAIRS], "str_tensor": [b"foo", b"bar"], "bin_tensor": b"hello"},
    ),
]

# (case, inputs of the signature, body, words of the INVALID_ARGUMENT)
REFUSED = [
    (
        "DeeplyNestedMalformed",
        ONE,
        '{"signature_name":' + "[" * 500_000 + "]" * 500_000 + "}",
        "key must be a string value",
    ),
    ("SingleUnnamedTensorErrors 1", ONE, "", "document is empty"),
    (
        "SingleUnnamedTensorErrors 2",
        ONE,
        '{"signature_name": 5, "instances": [[1,2],[3,4],[5,6,7]]}',
        "must be a string value",
    ),
    (
        "SingleUnnamedTensorErrors 3",
        ONE,
        '{"instances": [[1,2],[3,4],[5,6,7]], "inputs": [[1,2],[3,4],[5,6,7]]}',
        "Not formatted correctly",
    ),
    ("SingleUnnamedTensorErrors 4", ONE, '{"instances": [[1,2],[3,4],[5,6,7]]}', "Expecting tensor size"),
    ("SingleUnnamedTensorErrors 5", ONE, '{"instances": [[1,2],[3,4],[[5,6]]]}', "Expecting shape"),
    ("SingleUnnamedTensorErrors 6", ONE, '{"instances": [1, [1]]}', "Expecting shape"),
    ("SingleUnnamedTensorErrors 7", ONE, '{"instances": [[1,2],["a", "b"]]}', "not of expected type"),
    (
        "MultipleNamedTensorErrors 1",
        NAMED,
        """{"instances": [{"int_tensor": [[1,2],[3,4],[5,6]], "str_tensor": ["foo", "bar"]},
                          {"int_tensor": [[[7,8],[9,0],[1,2]]], "str_tensor": ["baz", "bat"]}]}""",
        "Expecting shape",
    ),
    (
        "MultipleNamedTensorErrors 2",
        NAMED,
        """{"instances": [{"int_tensor": [[1,2],[3,4],[5,6],[7,8]], "str_tensor": ["foo", "bar"]},
                          {"int_tensor": [[7,8],[9,0],[1,2]], "str_tensor": ["baz", "bat"]}]}""",
        "Expecting tensor size",
    ),
    (
        "MultipleNamedTensorErrors 3",
        NAMED,
        """{"instances": [{"int_tensor": [[1,2],[3,4],[5,6]], "str_tensor": ["foo", "bar"]}, [1, 20, 30],
                          {"int_tensor": [[[7,8],[9,0],[1,2]]], "str_tensor": ["baz", "bat"]}]}""",
        "Expecting object but got list",
    ),
    (
        "MultipleNamedTensorErrors 4",
        {"str_tensor": "string"},
        '{"instances": [["baz", "bar"], {"str_tensor": ["baz", "bat"]}]}',
        "Expecting value/list but got object",
    ),
]

# (case, body, signature named in it, the features of each example: a context's stand in each that lacks them)
EXAMPLES = [
    (
        "RequestNoContext",
        """{"examples": [{"names": ["foo", "bar"], "ratings": [8.0, 9.0], "age": 20},
                         {"names": ["baz"], "ratings": 6.0}]}""",
        "",
        [{"names": [b"foo", b"bar"], "ratings": [8.0, 9.0], "age": [20]}, {"names": [b"baz"], "ratings": [6.0]}],
    ),
    (
        "RequestWithContextAndSignature",
        """{"signature_name": "custom_signture", "context": {"query": "pizza", "location": ["sfo"]},
            "examples": [{"names": ["foo", "bar"], "ratings": [8.0, 9.0, NaN, Infinity], "age": 20},
                         {"names": ["baz", {"b64": "aGVsbG8="}], "ratings": 6.0, "intboolmix": [1, true, false]},
                         {"names": "bar", "ratings": -Infinity}]}""",
        "custom_signture",
        [
            {
                "query": [b"pizza"],
                "location": [b"sfo"],
                "names": [b"foo", b"bar"],
                "ratings": [8.0, 9.0, NAN, INF],
                "age": [20],
            },
            {
                "query": [b"pizza"],
                "location": [b"sfo"],
                "names": [b"baz", b"hello"],
                "ratings": [6.0],
                "intboolmix": [1, 1, 0],
            },
            {"query": [b"pizza"], "location": [b"sfo"], "names": [b"bar"], "ratings": [-INF]},
        ],
    ),
]

# (case, body, words of the INVALID_ARGUMENT)
EXAMPLES_REFUSED = [
    (
        "JsonErrors 1",
        '{"signature_name": ["hello"], "examples": [{"names": ["foo", "bar"]}]}',
        "'signature_name' key must be a string",
    ),
    ("JsonErrors 2", '{"context": [{"names": ["foo", "bar"]}]}', "Example must be JSON object"),
    ("JsonErrors 3", '{"examples": {"names": ["foo", "bar"]}}', "list/array"),
    ("JsonErrors 4", '{"examples": [[{"names": ["foo", "bar"]}]]}', "Example must be JSON object"),
    ("JsonErrors 5", '{"examples": [{"names": [10, null]}]}', "names has element with unexpected JSON type: Null"),
    ("JsonErrors 6", '{"examples": [{"names": [10, 10.0]}]}', "feature: names expecting type: int64"),
    (
        "JsonErrors 7",
        '{"examples": [{"names": [10, {"test": 10}]}]}',
        "names has element with unexpected JSON type: Object",
    ),
    ("JsonErrors 8", '{"examples": [{"names": [[10], 20]}]}', "names has element with unexpected JSON type: Array"),
    ("JsonErrors 9", '{"examples": [{"names": [20, 18446744073709551603]}]}', "Only int64_t is supported"),
]
