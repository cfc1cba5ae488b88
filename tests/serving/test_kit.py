"""The serving kit: files that TF Serving's own parsers take, sizes that follow from the measurement."""

import functools
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from google.protobuf import text_format

import tfvllm
from tfvllm.errors import InputError
from tfvllm.serving import config, kit
from tfvllm.serving.batching import BatchingOptions
from tfvllm.serving.deployment import cluster_name
from tfvllm.serving.manager import ModelConfig

SCHEMA = Path(__file__).with_name("kserve_inference_service.schema.json")


@pytest.fixture(scope="module")
def written(text_classifier, tmp_path_factory):
    base = tmp_path_factory.mktemp("kit") / "My_Sentiment"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "measure", functools.partial(kit.measure, seconds=0.1))
        return kit.write(tfvllm.export(text_classifier, base / "1", "classify", check=None))


def test_files(written):
    names = ["Dockerfile", "README.md", "batching_parameters.txt", "inference-service.yaml", "models.config"]
    assert sorted(path.name for path in written.iterdir()) == names
    assert "COPY . /models/My_Sentiment" in (written / "Dockerfile").read_text()


def test_models_config_is_tf_servings(written):
    pb2 = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    parsed = text_format.Parse((written / "models.config").read_text(), pb2.ModelServerConfig())
    assert [(c.name, c.base_path, c.model_platform) for c in parsed.model_config_list.config] == [
        ("My_Sentiment", "/models/My_Sentiment", "tensorflow")
    ]


def test_batching_parameters_read_back(written):
    read = config.read_batching(written / "batching_parameters.txt")
    assert read.options.max_batch_size == max(read.options.allowed_batch_sizes)
    assert read.slots >= 1


def test_kserve_manifest_fits_the_schema(written):
    schema = json.loads(SCHEMA.read_text())
    document = yaml.safe_load((written / "inference-service.yaml").read_text())
    jsonschema.validate(document, schema)
    assert document["metadata"]["name"] == cluster_name("My_Sentiment")
    document["spec"]["predictor"]["model"]["storageUrl"] = "typo"
    with pytest.raises(jsonschema.ValidationError, match="storageUrl"):
        jsonschema.validate(document, schema)


def test_choice_follows_the_measurement():
    def options(**rates):
        sizes = {int(name[1:]): rate for name, rate in rates.items()}
        return kit.choose({"rows_per_s": sizes, "run_ms": {size: 1000 * size / rate for size, rate in sizes.items()}})

    flat = options(s1=100, s2=101, s4=102)  # batching gains nothing: do not wait for it
    assert (flat.max_batch_size, flat.allowed_batch_sizes) == (1, (1,))
    rising = options(s1=100, s2=180, s4=300, s8=310, s16=305)
    assert (rising.max_batch_size, rising.allowed_batch_sizes) == (4, (1, 2, 4))
    assert rising.batch_timeout_ms == pytest.approx(0.1 * 4000 / 300, abs=1e-3)
    assert kit.choose(None).max_batch_size == 32


def test_measure_times_each_size(written):
    measured = kit.measure(written.parent / "1", seconds=0.2)
    assert measured["signature"] == "serving_default"
    assert list(measured["run_ms"])[:3] == [1, 2, 4]
    assert all(
        rate == pytest.approx(1000 * size / measured["run_ms"][size]) for size, rate in measured["rows_per_s"].items()
    )


# --- TF Serving's configuration files ---------------------------------------------------------------------------------


def test_models_config_round_trip(tmp_path):
    pb2 = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    models = [
        ModelConfig("a", Path("/m/a"), labels={"stable": 1, "canary": 2}, specific=(1, 2)),
        ModelConfig("b", Path("/m/b"), latest=None),
        ModelConfig("c", Path("/m/c"), latest=3),
        ModelConfig("d", Path("/m/d")),
    ]
    text = config.write_models(models)
    (tmp_path / "models.config").write_text(text)
    assert config.read_models(tmp_path / "models.config") == models
    real = text_format.Parse(text, pb2.ModelServerConfig()).model_config_list.config
    assert list(real[0].model_version_policy.specific.versions) == [1, 2]
    assert dict(real[0].version_labels) == {"stable": 1, "canary": 2}
    assert real[1].model_version_policy.HasField("all")
    assert real[2].model_version_policy.latest.num_versions == 3


def test_real_models_config_is_understood(tmp_path):
    pb2 = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    real = pb2.ModelServerConfig()
    entry = real.model_config_list.config.add(name="x", base_path="/m/x", model_platform="tensorflow")
    entry.model_version_policy.specific.versions.append(7)
    entry.version_labels["old"] = 7
    (tmp_path / "m").write_text(text_format.MessageToString(real))
    assert config.read_models(tmp_path / "m") == [ModelConfig("x", Path("/m/x"), specific=(7,), labels={"old": 7})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no model"),
        ("model_config_list { config { nam: 'x' } }", "no field named"),
        ("model_config_list { config { name: 'x' } }", "no base_path"),
        ("model_config_list { config { name: 'x' base_path: '/x' model_platform: 'jax' } }", "expected tensorflow"),
        ("model_config_list {", "Expected"),
    ],
)
def test_models_config_errors(tmp_path, text, words):
    (tmp_path / "models.config").write_text(text)
    with pytest.raises(InputError, match=words):
        config.read_models(tmp_path / "models.config")


def test_batching_file(tmp_path):
    file = tmp_path / "batching.txt"
    file.write_text(
        "max_batch_size { value: 16 }\nbatch_timeout_micros { value: 1500 }\nmax_enqueued_batches { value: 10 }\n"
        "num_batch_threads { value: 3 }\nallowed_batch_sizes: 4\nallowed_batch_sizes: 16\n"
        "pad_variable_length_inputs: true"
    )
    read = config.read_batching(file)
    assert read.options == BatchingOptions(True, 16, 1.5, (4, 16), True)
    assert (read.slots, read.max_queued) == (3, 160)
    file.write_text(config.write_batching(read.options, slots=3, max_enqueued_batches=10))
    assert config.read_batching(file) == read
    for text, words in (
        ("max_batch_size { value: 16 } allowed_batch_sizes: 8", "must rise and end with max_batch_size"),
        ("max_batch_size: 3", "Expected"),
        ("max_batch_syze { value: 1 }", "max_batch_syze"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            config.read_batching(file)
    with pytest.raises(InputError, match="cannot read"):
        config.read_batching(tmp_path / "none")


def test_versions_command(written, tmp_path):
    from tfvllm.cli.versions import command

    base, run = tmp_path / "base", CliRunner().invoke
    for number in (1, 2):
        assert (
            f"published {base / str(number)}" in run(command, ["publish", str(written.parent / "1"), str(base)]).output
        )
    assert "out of service: 2; serving 1" in run(command, ["rollback", str(base)]).output
    assert json.loads(run(command, ["list", str(base), "--json"]).output) == {"versions": [1], "retired": [2]}
    assert "in service again" in run(command, ["restore", str(base), "2"]).output
