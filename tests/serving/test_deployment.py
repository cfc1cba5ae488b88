"""The serving kit on a cluster: names it takes, batching that lint allows, memory that follows from the model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tensorflow as tf
import yaml
from click.testing import CliRunner
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2

import tfvllm
from tests import tiny_models
from tests.generation.models import build, gpt2
from tfvllm.cli import cli
from tfvllm.errors import InputError
from tfvllm.savedmodel import manifest, write
from tfvllm.serving import deployment, kit, lint
from tfvllm.serving.batching import is_batchable
from tfvllm.serving.deployment import MIB, Memory, cluster_name
from tfvllm.serving.servable import Servable

SCHEMA = json.loads(Path(__file__).with_name("kserve_inference_service.schema.json").read_text())


def batching_parameters():
    """TF Serving's BatchingParameters (session_bundle_config.proto), which its Python package leaves out."""
    fields = (
        *(("max_batch_size", 1, "Int64Value"), ("batch_timeout_micros", 2, "Int64Value")),
        *(("max_enqueued_batches", 3, "Int64Value"), ("num_batch_threads", 4, "Int64Value")),
        *(("thread_pool_name", 5, "StringValue"), ("allowed_batch_sizes", 6, "int64")),
        ("pad_variable_length_inputs", 7, "bool"),
    )
    wrappers = "google/protobuf/wrappers.proto"
    file = descriptor_pb2.FileDescriptorProto(name="b.proto", package="b", syntax="proto3", dependency=[wrappers])
    message = file.message_type.add(name="BatchingParameters")
    for name, number, kind in fields:
        field = message.field.add(name=name, number=number)
        field.label = field.LABEL_REPEATED if name == "allowed_batch_sizes" else field.LABEL_OPTIONAL
        if kind.endswith("Value"):
            field.type, field.type_name = field.TYPE_MESSAGE, f".google.protobuf.{kind}"
        else:
            field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("b.BatchingParameters"))


BatchingParameters = batching_parameters()


def written(folder, seconds=0.05):
    """The kit of a SavedModel: its files parsed by the readers they are meant for."""
    server = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    path = kit.write(folder, seconds=seconds)
    service = yaml.safe_load((path / "inference-service.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(service, SCHEMA)
    models = text_format.Parse((path / "models.config").read_text(encoding="utf-8"), server.ModelServerConfig())
    parameters = text_format.Parse((path / "batching_parameters.txt").read_text(), BatchingParameters())
    docker = (path / "Dockerfile").read_text(encoding="utf-8")
    command = json.loads(re.search(r"^CMD (\[.*\])$", docker, re.MULTILINE)[1])
    return {
        "service": service,
        "model": models.model_config_list.config[0],
        "parameters": parameters,
        "docker": docker,
        "command": command,
        "readme": (path / "README.md").read_text(encoding="utf-8"),
        "arguments": service["spec"]["predictor"]["model"].get("args", []),
        "memory": service["spec"]["predictor"]["model"]["resources"]["limits"]["memory"],
    }


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = ["情感", "情绪", "My_Sentiment", "my.sentiment", "MY-SENTIMENT", "éclair", "eclair_", "2024-model", "-x", "x-",
         "_", "a" * 200, "a" * 199 + "b", "Ünïcödé" * 30, "模型" * 40, "ﬁne", "sst2.v1", "½"]  # fmt: skip


def test_cluster_names_are_valid_different_and_stable():
    plain = ["sentiment", "my-sentiment", "eclair", "a", "a1-b"]
    found = {name: cluster_name(name) for name in [*NAMES, *plain]}
    for name in found.values():
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 39, name
    assert len(set(found.values())) == len(found)
    assert all(found[name] == name for name in plain)
    assert found["情感"] == "model-fd3640e4"  # the same on every machine
    assert found["My_Sentiment"].startswith("my-sentiment-") and found["éclair"].startswith("eclair-")


@pytest.mark.parametrize("name", ["a b", "a/b", "a:b", "", "$HOME", "a\nb", 'a"b', ".hidden", "--flag", "a;b", "*"])
def test_names_that_a_server_does_not_take(name):
    with pytest.raises(InputError, match="a model's name must be non-empty"):
        deployment.check_name(name)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of rows only, in a folder that no cluster takes as a name."""
    folder = tmp_path_factory.mktemp("deployment") / "情感" / "1"
    folder.mkdir(parents=True)
    module = tf.Module()
    module.kernel = tf.Variable(tf.ones([64, 32]))
    spec = tf.TensorSpec([None, 64], tf.float32, name="x")
    function = tf.function(lambda x: {"y": x @ module.kernel}).get_concrete_function(spec)
    write.save(module, {"serving_default": function}, folder)
    return folder


def test_a_chinese_folder(small):
    found = written(small)
    assert found["service"]["metadata"]["name"] == cluster_name("情感")
    assert found["service"]["metadata"]["annotations"] == {"tfvllm/model": "情感"}
    assert (found["model"].name, found["model"].base_path) == ("情感", "/models/情感")
    assert "COPY . /models/情感\nENV MODEL_NAME=情感 " in found["docker"]
    assert f"docker build -f serving-kit/Dockerfile -t {cluster_name('情感')} ." in found["readme"]


def test_a_wrong_name_is_refused_before_the_export(text_classifier, tmp_path):
    text_classifier.save(tmp_path / "t.keras")
    call = ["export", str(tmp_path / "t.keras"), str(tmp_path / "my model" / "1"), "--task", "classify"]
    error = CliRunner().invoke(cli, [*call, "--serving-kit"]).exception
    assert isinstance(error, InputError) and "without spaces" in str(error)
    assert not (tmp_path / "my model").exists()


# --- batching ---------------------------------------------------------------------------------------------------------


def on(found) -> bool:
    flags = [any("--enable_batching" in flag for flag in found[place]) for place in ("command", "arguments")]
    flags.append("--enable_batching=true\n" in found["readme"])
    assert len(set(flags)) == 1  # the files agree with each other
    return flags[0]


def test_batching_is_on_where_every_signature_has_rows_only(small, text_export, tmp_path):
    assert on(written(small))
    found = written(shutil.copytree(text_export, tmp_path / "text" / "1"))
    assert on(found) and not found["parameters"].pad_variable_length_inputs


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("story") / "story" / "1"
    return tfvllm.export(build(gpt2), path, "generate", max_length=32, check=None, warmup=False)


@pytest.mark.thorough
def test_batching_is_off_where_lint_says_that_the_server_refuses(story):
    found = written(story)
    assert not on(found)
    report = lint.lint(story, run=False)
    assert set(lint.unbatched(report)) == {"serving_default", "generate", "prefill", "decode"}
    for signature in ("generate", "prefill"):
        assert f"`{signature}`: input max_new_tokens has no rows" in found["readme"]
    scalars = {finding.signature for finding in report.findings if finding.code == "scalar"}
    assert scalars <= set(lint.unbatched(report))


def test_what_lint_lets_pass_the_server_here_batches(tmp_path):
    tiny_models.save_many(tmp_path / "1")
    refused = lint.unbatched(lint.lint(tmp_path / "1", run=False))
    servable = Servable(tmp_path / "1")
    alone = {name for name, signature in servable.signatures.items() if not is_batchable(signature)}
    servable.close()
    assert alone <= set(refused)
    assert {"repeat", "repeat_rows", "cut", "ragged"} <= set(refused)
    assert {"serving_default", "echo", "classify", "regress", "picky"} & set(refused) == set()
    assert refused["ragged"] == (
        "input ids differs in length from request to request, and without a padding_mask may not be padded"
    )
    assert not on(written(tmp_path / "1"))


def test_ids_with_a_mask_are_padded(tmp_path):
    specs = [tf.TensorSpec([None, None], tf.int32, name=name) for name in ("token_ids", "padding_mask")]
    function = tf.function(
        lambda token_ids, padding_mask: {"total": tf.reduce_sum(token_ids * padding_mask, axis=1)}
    ).get_concrete_function(*specs)
    (tmp_path / "m" / "1").mkdir(parents=True)
    write.save(tf.Module(), {"serving_default": function}, tmp_path / "m" / "1")
    found = written(tmp_path / "m" / "1")
    assert on(found) and found["parameters"].pad_variable_length_inputs


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_total_is_the_formula():
    part = Memory(512 * MIB, 100 * MIB, 50 * MIB, 30 * MIB, 20 * MIB, 3)
    exact = 1.2 * (512 + 2 * 100 + 50 + 3 * (30 + 20)) * MIB
    assert exact <= part.total < exact + 256 * MIB and part.total % (256 * MIB) == 0
    assert part.quantity == "1280Mi"
    assert Memory(1700 * MIB, 0, 0, 0, 0, 1).quantity == "2Gi"


def test_memory_follows_the_model(story, small, tmp_path):
    document = manifest.read(story)
    few = deployment.memory(story, document, target="portable", rows=2, runs=1)
    assert few.caches == 2 * 32 * document["cache_bytes_per_token"]
    many = deployment.memory(story, document, target="portable", rows=8, runs=2)
    assert (many.caches, many.runs, many.weights) == (4 * few.caches, 2, few.weights)
    longer = deployment.memory(story, {**document, "max_length": 64}, target="onednn", rows=2, runs=1)
    assert longer.caches == 2 * few.caches and longer.activations > few.activations
    assert 0 < longer.packed <= longer.weights and few.packed == 0
    low = deployment.memory(story, {**document, "precision": "bfloat16"}, target="portable", rows=2, runs=1)
    assert low.caches == 2 * few.caches
    # weights are read from the files
    module = tf.Module()
    module.kernel = tf.Variable(np.ones([4096, 8192], np.float32))
    spec = tf.TensorSpec([None, 4096], tf.float32, name="x")
    function = tf.function(lambda x: {"y": x @ module.kernel}).get_concrete_function(spec)
    (tmp_path / "big" / "1").mkdir(parents=True)
    write.save(module, {"serving_default": function}, tmp_path / "big" / "1")
    big = deployment.memory(tmp_path / "big" / "1", {}, target="portable", rows=1, runs=1)
    assert 128 * MIB <= big.weights < 130 * MIB
    assert written(tmp_path / "big" / "1")["memory"] != written(small)["memory"]


@pytest.mark.thorough
def test_a_fresh_process_stays_within(tmp_path):
    """Peak memory of a process with TensorFlow alone that serves the longest batch."""
    model = tiny_models.bert_classifier(layers=1, sequence_length=48)
    path = tfvllm.export(model, tmp_path / "m" / "1", "classify", check=None)
    program = (
        "import re, tfvllm.quietly\ntfvllm.quietly.import_tensorflow(without_keras=True)\n"
        "import numpy as np\nfrom tfvllm.savedmodel import warmup\nfrom tfvllm.serving import kit\n"
        "from tfvllm.serving.servable import Servable\n"
        f"s = Servable({str(path)!r})\n"
        "for n in range(3):\n    s.run('serving_default', {'text': np.array([b'good film ' * 60] * 32, object)})\n"
        # Not getrusage: what this process held before it became a Python of its own is counted there.
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reckoned = deployment.memory(path, manifest.read(path), target="portable", rows=32, runs=1)
    assert int(result.stdout) < reckoned.total < 3 * int(result.stdout)
