"""Batches: who runs with whom, what each gets back, and what one bad request does to its neighbours."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tfvllm.serving.batching import AdmissionLimit, Batcher, BatchingOptions, is_batchable
from tfvllm.serving.servable import Signature, Spec
from tfvllm.serving.status import ServingError


def signature(outputs=None, **inputs):
    specs = inputs or {"x": Spec("x:0", "float32", (-1, 2))}
    return Signature("s", "", specs, outputs or {"y": Spec("y:0", "float32", (-1,))})


class Model:
    """Row sums; records what it ran. Rows with a negative value are refused."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.runs = []
        self.active = self.most_active = 0

    async def __call__(self, inputs, outputs):
        self.runs.append({name: array.copy() for name, array in inputs.items()})
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        await asyncio.sleep(self.seconds)
        self.active -= 1
        if (inputs["x"] < 0).any():
            raise ServingError("INVALID_ARGUMENT", "negative")
        return {"y": inputs["x"].reshape(len(inputs["x"]), -1).sum(axis=1)}


def rows(*values):
    return {"x": np.array([[value, 0.5] for value in values], np.float32)}


def ask(model, requests, spec=None, slots=1, max_queued=1000, **options):
    async def main():
        room = AdmissionLimit(slots, max_queued)
        batcher = Batcher(spec or signature(), model, room, BatchingOptions(**options))
        answers = await asyncio.gather(*(batcher.submit(r, ("y",)) for r in requests), return_exceptions=True)
        assert room.queued == 0
        assert room.slots._value == slots  # every slot was given back
        return answers

    return asyncio.run(main())


def sizes(model):
    return [len(run["x"]) for run in model.runs]


def test_what_waits_together_runs_together_and_each_gets_its_own():
    model = Model(0.01)
    answers = ask(model, [rows(i) if i % 2 else rows(i, i + 100) for i in range(20)], max_batch_size=8)
    for i, answer in enumerate(answers):
        assert answer["y"].tolist() == ([i + 0.5] if i % 2 else [i + 0.5, i + 100.5])
    assert sum(sizes(model)) == 30
    assert len(model.runs) <= 6
    assert max(sizes(model)) <= 8


def test_a_lone_request_waits_for_nobody():
    model = Model()
    assert ask(model, [rows(1)], batch_timeout_ms=0)[0]["y"].tolist() == [1.5]
    assert sizes(model) == [1]


def test_timeout_waits_for_company():
    async def main(timeout):
        model = Model()
        batcher = Batcher(
            signature(), model, AdmissionLimit(1, 9), BatchingOptions(batch_timeout_ms=timeout, max_batch_size=2)
        )
        first = asyncio.ensure_future(batcher.submit(rows(1), ("y",)))
        await asyncio.sleep(0.02)
        second = asyncio.ensure_future(batcher.submit(rows(2), ("y",)))
        await asyncio.gather(first, second)
        return sizes(model)

    assert asyncio.run(main(500)) == [2]
    assert asyncio.run(main(0)) == [1, 1]


def test_slots_bound_the_runs_under_way():
    model = Model(0.01)
    ask(model, [rows(i) for i in range(12)], max_batch_size=2, slots=3)
    assert model.most_active == 3


def test_large_request_is_split():
    model = Model()
    answer = ask(model, [rows(*range(10))], max_batch_size=4)[0]
    assert answer["y"].tolist() == [i + 0.5 for i in range(10)]
    assert sizes(model) == [4, 4, 2]


def test_allowed_sizes_pad_with_the_first_row():
    model = Model()
    answer = ask(model, [rows(1, 2, 3)], max_batch_size=8, allowed_batch_sizes=(1, 4, 8))[0]
    assert answer["y"].tolist() == [1.5, 2.5, 3.5]
    assert model.runs[0]["x"][:, 0].tolist() == [1, 2, 3, 1]


def test_one_bad_request_fails_alone():
    answers = ask(Model(0.01), [rows(9), rows(1), rows(-1), rows(2)])
    assert [answer["y"].tolist() for answer in (answers[0], answers[1], answers[3])] == [[9.5], [1.5], [2.5]]
    assert isinstance(answers[2], ServingError)
    assert answers[2].code == "INVALID_ARGUMENT"


def test_a_crash_of_the_run_reaches_everyone_and_frees_the_slot():
    async def broken(inputs, outputs):
        raise RuntimeError("gone")

    answers = ask(broken, [rows(1), rows(2)])
    assert [answer.code for answer in answers] == ["INTERNAL", "INTERNAL"]


def test_different_widths_run_apart_or_padded():
    spec = signature(x=Spec("x:0", "float32", (-1, -1)))
    requests = [{"x": np.ones((1, width), np.float32)} for width in (3, 5, 3)]
    apart = Model(0.01)
    requests = [*requests, *requests]
    answers = ask(apart, requests, spec)
    assert [answer["y"].tolist() for answer in answers] == [[3], [5], [3], [3], [5], [3]]
    assert {run["x"].shape[1] for run in apart.runs} == {3, 5}
    padded = Model(0.01)
    answers = ask(padded, requests, spec, pad_variable_length_inputs=True)
    assert [answer["y"].tolist() for answer in answers] == [[3], [5], [3], [3], [5], [3]]
    assert len(padded.runs) < len(apart.runs)


def test_scalars_must_be_equal():
    spec = signature(x=Spec("x:0", "float32", (-1, 2)), n=Spec("n:0", "int32", ()))
    model = Model(0.01)
    ask(model, [{**rows(i), "n": np.int32(i % 2)} for i in range(8)], spec)
    for run in model.runs:
        assert run["n"].ndim == 0
        assert {int(value) % 2 for value in run["x"][:, 0]} == {int(run["n"])}


def test_inputs_with_a_default_are_no_rows():
    spec = signature(x=Spec("x:0", "float32", (-1, 2)), stops=Spec("s:0", "string", (-1,)))
    spec = replace(spec, defaults={"stops": np.array([], object)})
    model = Model(0.01)
    stops = [np.array([b"a"], object), np.array([b"b"], object)]
    answers = ask(model, [{**rows(i), "stops": stops[i % 2]} for i in range(8)], spec, max_batch_size=4)
    assert [answer["y"].tolist() for answer in answers] == [[i + 0.5] for i in range(8)]
    for run in model.runs:
        assert run["stops"].shape == (1,)
        assert {int(value) % 2 for value in run["x"][:, 0]} == {0 if run["stops"][0] == b"a" else 1}


def test_a_signature_with_a_seed_is_not_batched():
    inputs = {"x": Spec("x:0", "float32", (-1, 2)), "seed": Spec("seed:0", "int32", ())}
    assert not is_batchable(signature(**inputs))


def test_requests_of_other_shapes_than_declared_run_alone():
    """Their first dimension need not be rows: two [2]s are no [4]."""

    async def total(inputs, outputs):
        runs.append(inputs["x"].shape)
        await asyncio.sleep(0.01)
        return {"y": inputs["x"].sum(axis=-1)}

    runs = []
    vectors = [{"x": np.array([value, 0.5], np.float32)} for value in range(4)]
    cubes = [{"x": np.full((1, 2, 2), value, np.float32)} for value in range(3)]
    wide = [{"x": np.full((1, 3), value, np.float32)} for value in range(3)]
    answers = ask(total, [*vectors, *cubes, *wide, *(rows(value) for value in range(4))])
    assert [answer["y"].tolist() for answer in answers] == [
        *(value + 0.5 for value in range(4)),
        *([[2.0 * value] * 2] for value in range(3)),
        *([3.0 * value] for value in range(3)),
        *([value + 0.5] for value in range(4)),
    ]
    assert runs.count((2,)) == 4
    assert runs.count((1, 2, 2)) == 3
    assert runs.count((1, 3)) == 3
    assert (4, 2) in runs or (3, 2) in runs  # and those of the declared shape run together as ever


def test_too_many_waiting_are_refused():
    answers = ask(Model(0.05), [rows(i) for i in range(6)], max_queued=3, max_batch_size=1)
    codes = [answer.code for answer in answers if isinstance(answer, ServingError)]
    assert codes == ["RESOURCE_EXHAUSTED"] * 3


def test_a_request_whose_client_has_gone_is_not_run():
    async def main():
        model = Model(0.05)
        batcher = Batcher(signature(), model, AdmissionLimit(1, 9), BatchingOptions(max_batch_size=1))
        first = asyncio.ensure_future(batcher.submit(rows(1), ("y",)))
        await asyncio.sleep(0.01)
        gone = asyncio.ensure_future(batcher.submit(rows(2), ("y",)))
        last = asyncio.ensure_future(batcher.submit(rows(3), ("y",)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(first, last)
        return [run["x"][0, 0] for run in model.runs]

    assert asyncio.run(main()) == [1, 3]


def test_outputs_that_do_not_follow_the_rows_switch_batching_off():
    async def total(inputs, outputs):
        await asyncio.sleep(0.01)
        return {"y": np.array([inputs["x"].sum()])}

    async def main():
        batcher = Batcher(signature(), total, AdmissionLimit(1, 9), BatchingOptions())
        answers = await asyncio.gather(*(batcher.submit(rows(i), ("y",)) for i in range(4)))
        return [answer["y"].tolist() for answer in answers], batcher.batchable

    assert asyncio.run(main()) == ([[0.5], [1.5], [2.5], [3.5]], False)


@pytest.mark.parametrize(
    ("inputs", "outputs", "answer"),
    [
        ({"x": (-1, 2)}, {"y": (-1,)}, True),
        ({"x": (-1,), "n": ()}, {"y": (-1, -1)}, True),
        ({"x": (4, 2)}, {"y": (4,)}, False),
        ({"x": (-1,)}, {"y": ()}, False),
        ({"n": ()}, {"y": (-1,)}, False),
        ({"x": None}, {"y": (-1,)}, False),
    ],
)
def test_which_signatures_batch(inputs, outputs, answer):
    specs = [{name: Spec(name, "float32", shape) for name, shape in group.items()} for group in (inputs, outputs)]
    assert is_batchable(Signature("s", "", *specs)) is answer
