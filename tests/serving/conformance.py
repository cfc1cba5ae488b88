"""Writes docs/serving_conformance.md from the tests: `python -m tests.serving.conformance`.

The tables of requests and errors are those the tests run; what has a test of its own is listed by that test's name. A
test holds the document to this.
"""

import json
from pathlib import Path

from tests.serving import (
    cases,
    test_clients,
    test_crash,
    test_dtypes,
    test_seeds,
    test_server,
    test_soak,
    test_upstream,
    test_upstream_server,
    test_versions,
)
from tests.serving import test_grpc_conformance as grpc_tests
from tests.serving import test_rest_conformance as rest_tests
from tests.serving.cases import differences

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving_conformance.md"
HEAD = """# TF Serving's API, form by form

What `tfvllm serve` answers to each documented form of TF Serving's REST and gRPC APIs and to requests that are wrong,
and the test that asks it. REST is asked with `requests`, gRPC with the real `tensorflow-serving-api` client. A stock TF
Serving was not run beside it: the expectations are those of its sources and of its own tests, which are
[asked here too](#tf-servings-own-tests).

This file is made from the tests (`python -m tests.serving.conformance`); a test fails when it is out of date. `many` is
a model with two versions, the labels stable = 1 and canary = 2, and signatures of every kind; `text` is a text
classifier.

Names and dtypes are checked against the signature; shapes are for the graph to judge. So half_plus_two, which declares
`x` as [?, 1], answers `{"instances": [1.0, 2.0, 5.0]}`; where a graph refuses, the message says which shape is not as
declared.
"""
# (form, expected, the test's module, the test's name)
REST = [
    ("`POST /v1/models/M:classify`", "200, `results` as [label, score] pairs; scores equal Keras", "test_classify"),
    (
        "`:classify` without `signature_name`",
        "200 by the only classify signature, with a warning",
        "test_classify_without_signature_finds_the_only_one",
    ),
    ("`POST /v1/models/M[/versions/N]:regress`", "200, `results` as numbers", "test_regress"),
    (
        "`context` beside `examples`",
        "200, its features in each example that lacks them",
        "test_context_is_shared_by_the_examples",
    ),
    ("`:predict` on strings", "200, scores equal Keras", "test_predict_equals_keras"),
    ("`GET /v1/models/M[/versions/N, /labels/L]`", "200, `model_version_status`", "test_status"),
    ("`GET /v1/models/M[/versions/N]/metadata`", "200, `signature_def` with dtypes and shapes", "test_metadata"),
    ("`Content-Encoding: gzip`", "200; a body that is cut off: 400", "test_gzip_body"),
    ("a gzip body that unpacks beyond the limit", "413", "test_gzip_bomb_is_refused"),
    ("NaN and infinities in and out", "200, as TF Serving writes them", "test_non_finite_numbers"),
    (
        "escaped names, other case of the path",
        "200",
        "test_names_may_be_escaped_and_case_does_not_matter",
    ),
    ("`GET /healthz`, `/readyz`", "200", "test_health"),
    (
        "`GET /monitoring/prometheus/metrics`",
        "200, TF Serving's names",
        "test_metrics_have_tf_servings_names",
    ),
]
GRPC = [
    ("Predict", "typed fields, model_spec with the version", "test_predict"),
    ("Predict by version, by label", "that version's answer", "test_versions_and_labels"),
    ("Predict with `output_filter`", "those outputs alone", "test_output_filter"),
    ("Predict with an unknown `output_filter`", "INVALID_ARGUMENT", "test_unknown_output_filter"),
    ("strings, bytes, scalars, bool, bfloat16, float64", "as sent", "test_strings_bytes_scalars_and_dtypes"),
    ("`tensor_content` in place of typed fields", "understood", "test_tensor_content_is_understood"),
    ("Predict on strings", "scores equal Keras", "test_predict_equals_keras"),
    ("Classify", "labels and scores; scores equal Keras", "test_classify"),
    ("Classify by a signature that does not fit", "INVALID_ARGUMENT", "test_classify_by_a_predict_signature"),
    ("Classify without examples", "INVALID_ARGUMENT", "test_empty_input"),
    ("Regress with a context", "values", "test_regress_with_context"),
    ("MultiInference", "one result a task", "test_multi_inference"),
    (
        "MultiInference: no task, two models, a task twice, another method",
        "INVALID_ARGUMENT, UNIMPLEMENTED",
        "test_multi_inference_errors",
    ),
    ("GetModelMetadata", "`signature_def`; other or no fields: INVALID_ARGUMENT", "test_metadata"),
    ("GetModelStatus", "each version's state; unknown: NOT_FOUND", "test_status"),
    (
        "HandleReloadConfigRequest that is wrong",
        "INVALID_ARGUMENT, FAILED_PRECONDITION; nothing changes",
        "test_reload_errors_change_nothing",
    ),
    ("a message above the limit", "RESOURCE_EXHAUSTED", "test_message_too_large"),
    ("a deadline that is over", "DEADLINE_EXCEEDED", "test_deadline"),
    ("grpc.health.v1.Health/Check", "SERVING", "test_health"),
]
SERVER = [
    ("HandleReloadConfigRequest: other models, policies, labels", "served from then on", "test_reload_over_grpc"),
    (
        "a new version, a rollback under load",
        "no request lost, none wrong",
        "test_new_version_rollback_and_no_request_lost",
    ),
    (
        "a version that does not load",
        "state END with the reason; the old one serves",
        "test_broken_version_leaves_the_old_one_serving",
    ),
    (
        "two models; twelve versions come and go, labels, a rollback",
        "each answers as it should; memory is given back",
        "test_versions_that_come_and_go_give_their_memory_back",
    ),
    ("the folder is gone", "the last version serves", "test_vanished_folder_keeps_the_last_version"),
    ("too many requests waiting", "429", "test_queue_limit_is_429"),
    ("a run that takes too long", "504", "test_slow_run_is_504"),
    (
        "slow clients, dropped connections, a huge body, no HTTP",
        "408, closed, 413, 400; the server lives",
        "test_slow_and_vanishing_clients",
    ),
    ("token, basic authentication", "401, UNAUTHENTICATED without", "test_token_and_basic_auth"),
    ("TLS, and client certificates", "refused without", "test_tls"),
    ("a shutdown", "what is under way is answered", "test_shutdown_answers_what_is_under_way"),
    ("a worker process that is killed", "no request lost", "test_a_dead_worker_loses_nothing"),
]
OTHERS = [
    (
        "Classify, Regress, MultiInference on TensorFlow 2 models (predict method name)",
        "answered; INVALID_ARGUMENT with `--enable-signature-method-name-check`",
        test_upstream,
        "test_grpc",
    ),
    ("scalar and empty strings, bytes", "as sent, by REST and gRPC", test_dtypes, "test_scalar_string_out"),
    ("every dtype out", "its values; complex numbers by gRPC alone", test_dtypes, "test_numbers_out"),
    ("ragged, variant, quantized outputs", "501, UNIMPLEMENTED", test_dtypes, "test_what_cannot_be_answered_is_told"),
    (
        "`--model-config-file-poll-wait-seconds`",
        "a changed file is served; a wrong one is logged and changes nothing",
        test_upstream_server,
        "test_model_config_is_read_again",
    ),
    ("`--grpc-socket-path`", "gRPC on a Unix socket", test_upstream_server, "test_unix_socket"),
    ("`--grpc-channel-arguments`", "gRPC's own settings", test_upstream_server, "test_grpc_channel_arguments"),
    (
        "TF Serving's spelling of flags",
        "understood",
        test_upstream_server,
        "test_tf_servings_own_flags_are_understood",
    ),
    ("a Keras 2 model with an optimizer", "served", test_upstream_server, "test_keras_2_model_with_an_optimizer"),
    ("`ovmsclient`", "predict, status, metadata, errors by REST and gRPC", test_clients, "test_ovmsclient"),
    ("`min-tfs-client`", "predict", test_clients, "test_min_tfs_client"),
    ("KServe's client, protocol V1", "infer, liveness", test_clients, "test_kserve"),
    ("the same seed", "the same text, whoever else asks", test_seeds, "test_the_same_seed_gives_the_same_text"),
    (
        "SIGKILL under load, started again",
        "no answer wrong; the same port, the same answers",
        test_crash,
        "test_killed_under_load_and_started_again",
    ),
    (
        "a hundred silent, a hundred half-open connections",
        "shown out; the others are answered",
        test_crash,
        "test_silent_and_half_open_connections_take_nothing",
    ),
    (
        "load at saturation, two reloads, a killed worker",
        "0 lost, 0 wrong, memory flat",
        test_soak,
        "test_two_clients_two_reloads_one_dead_worker",
    ),
    (
        "publishing while a server reads",
        "never half a version",
        test_versions,
        "test_a_reader_never_sees_half_a_version",
    ),
]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _body(body) -> str:
    if body is None:
        return "–"
    text = body.decode("utf-8", "backslashreplace") if isinstance(body, bytes) else json.dumps(body)
    return f"`{text[:60]}{'…' if len(text) > 60 else ''}`" if text else "empty"


def _named(module, rows) -> list[list[str]]:
    for *_, name in rows:
        assert callable(getattr(module, name)), f"{module.__name__} has no {name}"
    return [[form, expected, f"`{module.__name__.rpartition('.')[2]}::{name}`"] for form, expected, name in rows]


def _upstream() -> list[str]:
    names = test_upstream.case_names()
    files = {name.partition("::")[0] for name in names}
    different = [[f"`{name}`", f"`{answer}`", reason] for name, (answer, reason) in differences.DIFFERENT.items()]
    return [
        f"""
## TF Serving's own tests

{len(names)} cases of {len(files)} of its test files (at commit `{cases.COMMIT[:12]}`) are asked here, as data: inputs
and expected values. {len(names) - len(different)} are answered as they expect, word for word where they look at words.
Tests: `test_upstream`; those that start a server of their own: `test_upstream_server`.

The others, by intent:
""",
        _table(["case", "tfvllm's answer holds", "why"], different),
        "\nTests that ask nothing here:\n",
        _table(["test", "why"], [[f"`{name}`", reason] for name, reason in differences.NOT_ASKED.items()]),
        "\nWhat its tests do not ask, and what differs by intent:\n",
        _table(["what", "TF Serving", "tfvllm", "why"], [list(row) for row in differences.BEYOND]),
    ]


def render() -> str:
    """The document's text."""
    asked = ["form", "expected", "test"]
    answers = [
        [what, f"`{path}:predict`", _body(body), _body(answer)] for what, path, body, answer in rest_tests.ANSWERS
    ]
    errors = [
        [what, f"`{method} {path or '/v1/models'}`", _body(body), str(status), words]
        for what, method, path, body, status, words in rest_tests.ERRORS
    ]
    failed = [[what, code, words] for what, _, code, words in grpc_tests.ERRORS]
    others = [row for form, expected, module, name in OTHERS for row in _named(module, [(form, expected, name)])]
    parts = [
        HEAD,
        "## REST: `:predict`\n\nTest: `test_rest_conformance::test_predict`.\n",
        _table(["form", "path after /v1/models", "body", "the whole answer (200)"], answers),
        "\n## REST: other calls\n",
        _table(asked, _named(rest_tests, REST)),
        "\n## REST: errors\n\nTest: `test_rest_conformance::test_error`. Each answer is a JSON object with the one key "
        "`error`, whose text holds these words, and the server goes on serving.\n",
        _table(["what is wrong", "request", "body", "status", "the message holds"], errors),
        "\n## gRPC\n",
        _table(asked, _named(grpc_tests, GRPC)),
        "\n## gRPC: errors of Predict\n\nTest: `test_grpc_conformance::test_error`.\n",
        _table(["what is wrong", "code", "the message holds"], failed),
        "\n## The server as a whole\n",
        _table(asked, _named(test_server, SERVER) + others),
        *_upstream(),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render(), encoding="utf-8")
