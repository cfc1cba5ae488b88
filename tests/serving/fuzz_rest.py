"""Coverage-guided fuzzing of the REST parsers with Atheris (libFuzzer).

    python -m tests.serving.fuzz_rest -runs=100000 [-seed=1] [CORPUS_FOLDER]

An input that gives anything but a request or INVALID_ARGUMENT is written to a file `crash-…`, and the exit code is 77.
"""

import sys

import atheris

with atheris.instrument_imports(include=["tfvllm.serving.tensors", "tfvllm.serving.examples"]):
    from tfvllm.serving import examples, tensors  # noqa: F401

from tests.serving.test_fuzz import check_examples, check_predict


def one_input(data: bytes) -> None:
    check_predict(data)
    check_examples(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
