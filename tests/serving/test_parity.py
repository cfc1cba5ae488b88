"""One model, five ways to ask it: Keras, the SavedModel in Python, TensorFlow's C API, REST, gRPC: the same scores."""

import grpc
import numpy as np
import requests
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests import tiny_models
from tests.capi import loader
from tfvllm.savedmodel import parity

TEXTS = [*tiny_models.TEXTS, "\t\n", "a" * 300, "bad bad film", "好"]


def test_every_way_to_ask_gives_the_same_scores(classifier, exports, server, url):
    texts = np.array([text.encode() for text in TEXTS], object)
    saved = exports / "text" / "1"
    expected = tiny_models.keras_scores(classifier, TEXTS)
    assert np.ptp(expected[:, 0]) > 0.1  # otherwise the comparison would say nothing

    answer = requests.post(f"{url}/text:predict", json={"instances": TEXTS}, timeout=20).json()["predictions"]
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "text"
    request.inputs["text"].CopyFrom(tf.make_tensor_proto(texts))
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=20)
    found = {
        "Python": parity.run_here(saved, [("serving_default", {"text": texts})])[0]["scores"],
        "C API": loader.run(saved, "serving_default", {"text": texts})["scores"],
        "REST": np.array([row["scores"] for row in answer], np.float32),
        "gRPC": tf.make_ndarray(response.outputs["scores"]),
    }
    for way, scores in found.items():
        np.testing.assert_allclose(scores, expected, atol=1e-5, err_msg=way)
    # REST writes the digits that give the float32 back, so that the protocols agree to the bit.
    np.testing.assert_array_equal(found["REST"], found["gRPC"])
