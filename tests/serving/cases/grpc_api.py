"""Calls of the gRPC API as text protos, and their answers.

From tensorflow_serving/servables/tensorflow/{predict_util,predict_impl,multi_inference,get_model_metadata_impl,
classifier,regressor}_test.cc and tensorflow_serving/model_servers/{get_model_status_impl_test.cc,
tensorflow_model_server_test.py}. The models are those of `upstream_models`, all in version 123; `checked` before a
model's name asks a server with --enable-signature-method-name-check.
"""

from tests.serving.cases.protos import (
    classified,
    example,
    floats,
    listed,
    output,
    regressed,
    regressions,
    scored,
    spec,
    task,
)

PREDICT, CLASSIFY, REGRESS = (f"tensorflow/serving/{name}" for name in ("predict", "classify", "regress"))
UTIL, IMPL, MULTI = "predict_util_test", "predict_impl_test", "multi_inference_test"
METADATA, STATUS, SERVER = "get_model_metadata_impl_test", "get_model_status_impl_test", "tensorflow_model_server_test"
CLASSIFIER, REGRESSOR = "classifier_test", "regressor_test"
INVALID, PRECONDITION, NOT_FOUND = "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"


TWO = (("dos", 2.0), ("uno", 1.0)), (("cuatro", 4.0), ("tres", 3.0))
BOTH = listed(scored(*TWO[0]), scored(*TWO[1]))
OUTPUTS = listed(output(2.0), output(3.0))
STRING = "inputs { key: 'x' value { dtype: DT_STRING tensor_shape { dim { size: 1 } } string_val: 'any_value' } }\n"
UNKNOWN = STRING.replace("'x'", "'unknown_key1'") + floats("unknown_key2", 1.0, 1)
BOOL = "inputs { key: 'x' value { dtype: DT_BOOL tensor_shape {} bool_val: true } }\n"

# (case, [(call, request, response), …]): calls that must follow one another, on a counter that stands at 0
SEQUENCES = [
    (
        f"{file}::PredictionWithCustomizedSignatures",
        [
            (
                "Predict",
                spec("counter", name) + (floats("delta", 3.0) if name == "incr_counter_by" else ""),
                spec("counter", name) + floats("output", value, field="outputs"),
            )
            for name, value in [
                ("get_counter", 0),
                ("incr_counter", 1),
                ("reset_counter", 0),
                ("incr_counter", 1),
                ("incr_counter_by", 4),
            ]
        ],
    )
    for file in (UTIL, IMPL)
]

# (case, call, request, response)
ANSWERED = [
    *(
        (
            f"{file}::PredictionSuccess",
            "Predict",
            spec() + floats("x", 2.0),
            spec("default", "serving_default") + floats("y", 3.0, field="outputs"),
        )
        for file in (UTIL, IMPL)
    ),
    *(
        (
            f"{file}::PredictionWithNamedRegressionSignature",
            "Predict",
            spec("default", "regress_x2_to_y3") + floats("inputs", 2.0),
            spec("default", "regress_x2_to_y3") + floats("outputs", 4.0, field="outputs"),
        )
        for file in (UTIL, IMPL)
    ),
    *(
        (
            f"{file}::PredictionWithNamedClassificationSignature",
            "Predict",
            spec("default", "classify_x2_to_y3") + floats("inputs", 2.0),
            spec("default", "classify_x2_to_y3") + floats("scores", 4.0, field="outputs"),
        )
        for file in (UTIL, IMPL)
    ),
    (
        f"{UTIL}::OutputFiltersDontMatchModelSpecOutputs 2",
        "Predict",
        spec() + floats("x", 2.0) + "output_filter: 'y'",
        spec("default", "serving_default") + floats("y", 3.0, field="outputs"),
    ),
    (
        f"{UTIL}::MethodNameCheck 1",
        "Predict",
        spec("checked default") + floats("x", 2.0),
        spec("default", "serving_default") + floats("y", 3.0, field="outputs"),
    ),
    (
        f"{UTIL}::MethodNameCheck 3",
        "Predict",
        spec() + floats("x", 2.0),
        spec("default", "serving_default") + floats("y", 3.0, field="outputs"),
    ),
    (
        f"{UTIL}::MethodNameCheck 4",
        "Predict",
        spec("counter", "odd_method") + floats("x", 2.0),
        spec("counter", "odd_method") + floats("y", 3.0, field="outputs"),
    ),
    *(
        (f"{MULTI}::{case}, {model}", "MultiInference", example(2.0) + tasks, answers)
        for model in ("default", "tf2")
        for case, tasks, answers in [
            (
                "ValidSingleSignatureTest",
                task("regress_x_to_y", REGRESS, model),
                regressed("regress_x_to_y", 3.0, name=model),
            ),
            (
                "MultipleValidRegressSignaturesTest",
                task("regress_x_to_y", REGRESS, model) + task("regress_x_to_y2", REGRESS, model),
                regressed("regress_x_to_y", 3.0, name=model) + regressed("regress_x_to_y2", 4.0, name=model),
            ),
            (
                "RegressAndClassifySignaturesTest",
                task("regress_x_to_y", REGRESS, model) + task("classify_x_to_y", CLASSIFY, model),
                regressed("regress_x_to_y", 3.0, name=model)
                + f"results {{ {spec(model, 'classify_x_to_y')} classification_result {{ classifications {{ "
                "classes { score: 3.0 } } } }",
            ),
        ]
    ),
    *(
        (
            f"{SERVER}::testMultiInference, {model}",
            "MultiInference",
            example(2.0) + task("regress_x_to_y", REGRESS, model) + task("classify_x_to_y", CLASSIFY, model),
            regressed("regress_x_to_y", 3.0, name=model)
            + f"results {{ {spec(model, 'classify_x_to_y')} classification_result {{ classifications {{ "
            "classes { score: 3.0 } } } }",
        )
        for model in ("default", "tf2")
    ),
    *(
        (
            f"{SERVER}::testClassify, {model}",
            "Classify",
            spec(model, "classify_x_to_y", None) + example(2.0),
            spec(model, "classify_x_to_y") + classified((("", 3.0),)),
        )
        for model in ("default", "tf2")
    ),
    *(
        (
            f"{SERVER}::testRegress, {model}",
            "Regress",
            spec(model, "regress_x_to_y", None) + example(2.0),
            spec(model, "regress_x_to_y") + regressions(3.0),
        )
        for model in ("default", "tf2")
    ),
    *(
        (
            f"{SERVER}::{case}",
            "Predict",
            spec(model, signature, None) + floats("x", 2.0, *shape) + ("output_filter: 'y'" if picked else ""),
            spec(model, signature) + floats("y", value, *answer, field="outputs"),
        )
        for case, model, signature, shape, answer, picked, value in [
            ("testPredictSavedModel 1", "default", "serving_default", (1,), (1,), True, 3.0),
            ("testPredictSavedModel 2", "default", "serving_default", (1,), (1,), False, 3.0),
            ("testGoodModelConfig 3", "half_plus_three", "serving_default", (1,), (1,), True, 4.0),
            ("testGoodModelConfig 4", "half_plus_three", "serving_default", (1,), (1,), False, 4.0),
            ("test_tf_saved_model_save", "saved", "serving_default", (1,), (1,), False, 12.0),
            ("test_tf_saved_model_save_multiple_signatures 1", "saved", "custom_signature_key", (1,), (), True, 2.0),
        ]
    ),
    (
        f"{STATUS}::SingleVersionSuccess",
        "GetModelStatus",
        spec(),
        "model_version_status { version: 123 state: AVAILABLE status {} }",
    ),
    (
        f"{SERVER}::testGetModelStatus",
        "GetModelStatus",
        spec(version=None),
        "model_version_status { version: 123 state: AVAILABLE status {} }",
    ),
    (
        f"{CLASSIFIER}::ExampleList",
        "Classify",
        spec("classifier", "serving_default") + BOTH,
        spec("classifier", "serving_default") + classified(*TWO),
    ),
    (
        f"{CLASSIFIER}::ExampleListWithContext",
        "Classify",
        spec("classifier", "serving_default") + listed("", "", context=scored(*TWO[0])),
        spec("classifier", "serving_default") + classified(TWO[0], TWO[0]),
    ),
    (
        f"{CLASSIFIER}::ExampleListWithContext_DuplicateFeatures",
        "Classify",
        spec("classifier", "serving_default") + listed("", scored(*TWO[1]), context=scored(*TWO[0])),
        spec("classifier", "serving_default") + classified(*TWO),
    ),
    (
        f"{CLASSIFIER}::ClassesOnly",
        "Classify",
        spec("classifier", "classes_only") + BOTH,
        spec("classifier", "classes_only") + classified(*(tuple((label, 0) for label, _ in row) for row in TWO)),
    ),
    (
        f"{CLASSIFIER}::ScoresOnly",
        "Classify",
        spec("classifier", "scores_only") + BOTH,
        spec("classifier", "scores_only") + classified(*(tuple(("", score) for _, score in row) for row in TWO)),
    ),
    (
        f"{CLASSIFIER}::ValidNamedSignature",
        "Classify",
        spec("classifier", "plus_one") + BOTH,
        spec("classifier", "plus_one")
        + classified(*(tuple((label, score + 1) for label, score in row) for row in TWO)),
    ),
    (
        f"{REGRESSOR}::BasicExampleList",
        "Regress",
        spec("classifier", "regress") + OUTPUTS,
        spec("classifier", "regress") + regressions(2.0, 3.0),
    ),
    (
        f"{REGRESSOR}::BasicExampleListWithContext",
        "Regress",
        spec("classifier", "regress") + listed("", "", context=output(3.0)),
        spec("classifier", "regress") + regressions(3.0, 3.0),
    ),
    (
        f"{REGRESSOR}::ValidNamedSignature",
        "Regress",
        spec("classifier", "regress_plus_one") + OUTPUTS,
        spec("classifier", "regress_plus_one") + regressions(3.0, 4.0),
    ),
]

# (case, call, request, code, words of the error)
REFUSED = [
    *((f"{file}::MissingOrEmptyModelSpec 1", "Predict", "", INVALID, "") for file in (UTIL, IMPL)),
    *((f"{file}::MissingOrEmptyModelSpec 2", "Predict", "model_spec {}", INVALID, "") for file in (UTIL, IMPL)),
    (f"{IMPL}::MissingOrEmptyModelSpec 3", "Predict", spec("test", version=None), NOT_FOUND, ""),
    *((f"{file}::EmptyInputList", "Predict", spec(), INVALID, "") for file in (UTIL, IMPL)),
    (
        f"{UTIL}::InputTensorsDontMatchModelSpecInputs 1",
        "Predict",
        spec() + UNKNOWN,
        INVALID,
        "Sent extra: {unknown_key1,unknown_key2}",
    ),
    (
        f"{UTIL}::InputTensorsDontMatchModelSpecInputs 2",
        "Predict",
        spec() + UNKNOWN,
        INVALID,
        "Missing but required: {x}",
    ),
    (f"{IMPL}::InputTensorsDontMatchModelSpecInputs", "Predict", spec() + UNKNOWN, INVALID, ""),
    (
        f"{UTIL}::PredictionInvalidTensor",
        "Predict",
        spec() + BOOL,
        INVALID,
        "Expects arg[0] to be float but bool is provided",
    ),
    *(
        (
            f"{file}::OutputFiltersDontMatchModelSpecOutputs 1",
            "Predict",
            spec() + floats("x", 2.0) + "output_filter: 'output_filter'",
            INVALID,
            "output tensor alias not found in signature: output_filter",
        )
        for file in (UTIL, IMPL)
    ),
    *(
        (
            f"{file}::OutputFiltersDontMatchModelSpecOutputs 3",
            "Predict",
            spec() + floats("x", 2.0) + "output_filter: 'y' output_filter: 'y'",
            INVALID,
            "duplicate output tensor alias: y",
        )
        for file in (UTIL, IMPL)
    ),
    (
        f"{UTIL}::InputTensorsHaveWrongType",
        "Predict",
        spec() + STRING + "output_filter: 'y'",
        INVALID,
        "to be float but string is provided",
    ),
    (
        f"{IMPL}::InputTensorsHaveWrongType",
        "Predict",
        spec() + STRING + "output_filter: 'y'",
        INVALID,
        "",
    ),
    (f"{UTIL}::ModelMissingSignatures", "Predict", spec("counter") + floats("x", 2.0), PRECONDITION, ""),
    (
        f"{UTIL}::MethodNameCheck 2",
        "Predict",
        spec("checked counter", "odd_method") + floats("x", 2.0),
        "INTERNAL",
        "Expected prediction signature method_name to be one of",
    ),
    *(
        (f"{MULTI}::{case}, {model}", "MultiInference", given, code, words)
        for model in ("default", "tf2")
        for case, given, code, words in [
            ("MissingInputTest", task("regress_x_to_y", REGRESS, model), INVALID, "Input is empty"),
            (
                "UndefinedSignatureTest",
                example(2.0) + task("ThisSignatureDoesNotExist", REGRESS, model),
                INVALID,
                "signature not found",
            ),
            (
                "InconsistentModelSpecsInRequestTest",
                example(2.0) + task("regress_x_to_y", REGRESS, model) + task("regress_x_to_y", REGRESS, "Another"),
                INVALID,
                "must access the same model name",
            ),
            (
                "EvaluateDuplicateSignaturesTest",
                example(2.0) + task("regress_x_to_y", REGRESS, model) * 2,
                INVALID,
                "Duplicate evaluation of signature: regress_x_to_y",
            ),
            (
                "UsupportedSignatureTypeTest",
                example(2.0) + task("serving_default", PREDICT, model),
                "UNIMPLEMENTED",
                "Unsupported signature",
            ),
        ]
    ),
    (f"{METADATA}::EmptyOrInvalidMetadataFieldList 1", "GetModelMetadata", "", INVALID, ""),
    (f"{METADATA}::EmptyOrInvalidMetadataFieldList 2", "GetModelMetadata", "metadata_field: 'some_stuff'", INVALID, ""),
    (f"{METADATA}::MissingOrEmptyModelSpec 1", "GetModelMetadata", "metadata_field: 'signature_def'", INVALID, ""),
    (
        f"{METADATA}::MissingOrEmptyModelSpec 2",
        "GetModelMetadata",
        "metadata_field: 'signature_def' model_spec {}",
        INVALID,
        "",
    ),
    (
        f"{METADATA}::MissingOrEmptyModelSpec 3",
        "GetModelMetadata",
        "metadata_field: 'signature_def' " + spec("test", version=None),
        NOT_FOUND,
        "",
    ),
    (f"{STATUS}::MissingOrEmptyModelSpecFailure", "GetModelStatus", "", INVALID, ""),
    (f"{STATUS}::InvalidModelNameFailure", "GetModelStatus", spec("none", version=None), NOT_FOUND, ""),
    (f"{STATUS}::InvalidModelVersionFailure", "GetModelStatus", spec(version=9), NOT_FOUND, ""),
    *(
        (f"{CLASSIFIER}::{case}", "Classify", spec("classifier", signature) + given, INVALID, words)
        for case, signature, given, words in [
            ("InvalidNamedSignature", "regress", BOTH, ""),
            ("MalformedScores", "rank_three", BOTH, "Expected Tensor shape: [batch_size num_classes]"),
            ("MissingClassificationSignature", "none", BOTH, "No signature was found with the name"),
            ("EmptyInput", "serving_default", "", "Input is empty"),
            ("EmptyExampleList", "serving_default", "input { example_list {} }", "Input is empty"),
            ("EmptyExampleListWithContext", "serving_default", listed(context=scored(*TWO[0])), "Input is empty"),
            ("ClassesIncorrectTensorBatchSize", "classes_batch", BOTH, "batch size"),
            ("ClassesIncorrectTensorType", "classes_type", BOTH, "Expected classes Tensor of DT_STRING"),
            ("ScoresIncorrectTensorBatchSize", "scores_batch", BOTH, "batch size"),
            ("ScoresIncorrectTensorType", "scores_type", BOTH, "Expected scores Tensor of DT_FLOAT"),
            ("MismatchedNumberOfTensorClasses", "widths", BOTH, "Tensors class and score should match in dim_size(1)"),
        ]
    ),
    (
        f"{CLASSIFIER}::MethodNameCheck",
        "Classify",
        spec("checked tf2", "classify_x_to_y") + example(2.0),
        INVALID,
        "Expected classification signature method_name to be tensorflow/serving/classify",
    ),
    *(
        (f"{REGRESSOR}::{case}", "Regress", spec("classifier", signature) + given, INVALID, words)
        for case, signature, given, words in [
            ("InvalidNamedSignature", "serving_default", OUTPUTS, ""),
            ("MalformedOutputs", "regress_wide", OUTPUTS, "Expected output Tensor shape to be either"),
            ("EmptyInput", "regress", "", "Input is empty"),
            ("EmptyExampleList", "regress", "input { example_list {} }", "Input is empty"),
            ("EmptyExampleListWithContext", "regress", listed(context=output(3.0)), "Input is empty"),
            ("UnexpectedOutputTensorSize", "regress_batch", OUTPUTS, "output batch size"),
            ("UnexpectedOutputTensorType", "regress_type", OUTPUTS, "Expected output Tensor of DT_FLOAT"),
            ("MissingRegressionSignature", "none", OUTPUTS, "No signature was found with the name"),
        ]
    ),
    (
        f"{REGRESSOR}::MethodNameCheck",
        "Regress",
        spec("checked tf2", "regress_x_to_y") + example(2.0),
        INVALID,
        "Expected regression signature method_name to be tensorflow/serving/regress",
    ),
]
