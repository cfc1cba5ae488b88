"""How many units each block keeps."""

import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.models import adapter_for
from tfvllm.pruning import apply_plan, mask_model, plan_shrink
from tfvllm.pruning.allocation import Site, adapt, standardised

FEW = np.asarray([9.0, *[1.0] * 9])  # z: one at 3, the others below 0
MANY = np.asarray([*[9.0] * 9, 1.0])  # nine at 1/3


def site(scores, count, cost=1, step=1, channels=1):
    return Site("ffn", "decoder.0", count, np.asarray(scores), cost, channels, step)


def test_scores_are_standardised():
    np.testing.assert_allclose(standardised(FEW), [3.0, *[-1 / 3] * 9])
    np.testing.assert_allclose(standardised(1e3 * MANY), [*[1 / 3] * 9, -3.0])
    np.testing.assert_array_equal(standardised(np.ones(4)), np.zeros(4))


def test_one_threshold_for_all_sites():
    sites = [site(FEW, 5), site(100 * MANY, 5)]
    adapt(sites)
    assert [found.count for found in sites] == [1, 9]


def test_a_unit_costs_its_parameters():
    sites = [site(MANY, 5, cost=4), site(FEW, 10, cost=1)]
    adapt(sites)  # 1 x 4 and 1 x 1 stay anyway; of the 25 left, 4 each go to the next of MANY
    assert [found.count for found in sites] == [7, 1]


def test_a_head_counts_as_the_mean_of_its_channels():
    sites = [site(FEW, 2, channels=100), site(np.arange(10.0), 8)]  # z: 0.3 and nine at -0.03; 1.57 to -1.57
    adapt(sites)
    assert [found.count for found in sites] == [5, 5]


def test_every_site_keeps_one_step():
    sites = [site(np.arange(10.0), 4, step=4), site(np.zeros(10), 4, step=4)]
    adapt(sites)
    assert [found.count for found in sites] == [4, 4]
    sites = [site(np.arange(3.0), 1), site(np.arange(3.0), 1)]
    adapt(sites)
    assert [found.count for found in sites] == [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_met_within_one_step(seed):
    random = np.random.default_rng(seed)
    sites = [
        site(random.lognormal(size=units), random.integers(step, units + 1), int(random.integers(1, 50)), step)
        for units, step in zip(random.integers(8, 60, 6), random.integers(1, 8, 6))
    ]
    budget = sum(found.count * found.cost for found in sites)
    adapt(sites)
    spent = sum(found.count * found.cost for found in sites)
    least = sum(found.step * found.cost for found in sites)
    assert abs(max(budget, least) - spent) <= max(found.step * found.cost for found in sites)
    assert all(found.step <= found.count <= len(found.scores) for found in sites)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_adaptive_model_equals_the_masked_one(name):
    model, found = zoo.build(name), zoo.inputs(name)
    adapter = adapter_for(model)
    skewed = [FEW, MANY, np.asarray([5.0, 4.0, *[0.0] * 8])]
    scores = {("ffn", block.feed_forward.place): np.resize(s, 24) for block, s in zip(adapter.blocks(model), skewed)}
    options = {"heads": 0.5, "ffn": 0.5, "importance": scores, "round_to": 1}
    plan = plan_shrink(model, adaptive=True, **options)
    small, even = apply_plan(model, plan), tfvllm.shrink(model, **options)
    neurons = [block.ffn_width for block in adapter.blocks(small)]
    assert neurons[1] == max(neurons) > 12 > min(neurons) >= 1
    block = adapter.blocks(model)[0]
    group = sum(p.layer.count_params() for p in block.attention.projections) // block.kv_heads  # the dearest unit
    assert abs(small.count_params() - even.count_params()) <= group
    mask_model(model, plan)
    np.testing.assert_allclose(np.asarray(small(found)), np.asarray(model(found)), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_by_what_the_units_give_on_data(tmp_path):
    import keras

    model, x = zoo.build("gpt2"), zoo.inputs("gpt2", 8)
    data = (x, x["token_ids"], x["padding_mask"])
    loud = adapter_for(model).blocks(model)[2].feed_forward.up.layer
    loud.kernel.assign(
        np.concatenate([np.asarray(loud.kernel)[:, :18], 1e-3 * np.asarray(loud.kernel)[:, 18:]], axis=1)
    )
    small = tfvllm.shrink(model, ffn=0.5, heads=0.25, importance="activation", data=data, adaptive=True, round_to=1)
    neurons = [block.ffn_width for block in adapter_for(small).blocks(small)]
    assert neurons[2] == max(neurons) > min(neurons)
    small.save(tmp_path / "small.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "small.keras")(x), small(x))


def test_what_adaptive_does_not_go_with():
    model = zoo.build("bert")
    with pytest.raises(InputError, match=r"adaptive=True shares out .* found heads=None, ffn=None"):
        plan_shrink(model, layers=2, adaptive=True)
    with pytest.raises(InputError, match=r"adaptive=True shares out .* allocation='global'"):
        plan_shrink(model, ffn=0.5, allocation="global", adaptive=True)
