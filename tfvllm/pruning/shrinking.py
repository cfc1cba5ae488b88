"""`tfvllm.shrink`: a new, smaller, ordinary Keras model."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfvllm.errors import InputError
from tfvllm.families import EXPERTS, FFN, HEADS, KV_HEADS, VOCABULARY, WIDTH, Adapter, Block, Experts, adapter_for
from tfvllm.families.stored import effective, refuse_quantised, stored
from tfvllm.pruning.allocation import Site, adapt, compete
from tfvllm.pruning.importance import Scores, UnitStatistics, unit_scores
from tfvllm.pruning.structure import (
    Plan,
    apply_plan,
    best,
    full_plan,
    head_keep,
    head_unit,
    per_layer,
    resolve,
)

Request = Any  # float: share removed; int: number kept; list: one of these per block; None: leave whole


def shrink(
    model: Any,
    *,
    heads: Request = None,
    ffn: Request = None,
    experts: Request = None,
    layers: Request = None,
    width: Request = None,
    vocabulary: Request = None,
    importance: Any = "magnitude",
    data: Any = None,
    compensate: bool | str | None = None,
    allocation: str = "uniform",
    adaptive: bool = False,
    round_to: int = 16,
    limit: int = 64,
) -> Any:
    """A new keras-nlp model without the least important heads, neurons, experts, layers, channels or tokens.

    The result is an ordinary Keras model: of the original class where a config can say its sizes, else of a registered
    subclass (loading one needs `import tfvllm.models` first). It keeps task head and preprocessor, is compiled with the
    task's defaults, saves, loads, trains and generates. `model` is left as it was.

    A float is the share removed, an int the number kept, None leaves the unit whole. Lists give one value per block
    that stays, encoder blocks first.

    Args:
        model: a keras-nlp backbone or task, or a Keras model around one backbone (then not width or vocabulary).
        heads: attention heads, of self- and cross-attention alike. Under grouped-query attention whole key/value groups
            go with their query heads; an int counts query heads. With one group for all, single query heads go.
        ffn: feed-forward neurons (gate and up together); in every expert of a block those of the same number.
        experts: experts of a mixture, with their places in the router. A token takes as many as before, or all that
            stay where these are fewer. Blocks without experts are left as they are, whatever a list says of them.
        layers: also a list of block indices to keep, or {"encoder": …, "decoder": …}.
        width: channels of the residual stream, the same in the whole model. Always left even.
        vocabulary: also a list of token ids to keep; "seen" keeps what `data` uses. Special tokens always stay; the
            tokenizer of the preprocessor is cut to match.
        importance: "magnitude", "taylor", "activation", a mapping or a function: see `importance.unit_scores`.
        data: calibration batches, as for `fit`.
        compensate: "mean" (or True): add the removed units' mean contribution to the output bias (FLAP, An et al. 2023,
            arXiv:2312.11983, eq. 5). "least_squares": also fit the output weights of the units that stay, so that they
            give on `data` what all units gave (the mask tuning of Kwon et al. 2022, arXiv:2204.09656, with whole
            weights). False: neither. Default: "mean" wherever data is given and the family has output biases.
        allocation: "uniform": the same share in every block; "global": heads and neurons compete over all blocks after
            scores are divided by their block's mean, and so do experts; at least one unit stays in each.
        adaptive: in place of `allocation`, heads and neurons of all blocks share one budget: the parameters that the
            shares or counts asked for would leave. It is spent on the units whose scores, standardised within their
            block, are the highest (FLAP's adaptive structure); at least one head and one step of neurons stay in each.
        round_to: neuron and channel counts that come from shares are rounded to this multiple.
        limit: calibration batches used at most.

    Raises:
        InputError: a share outside [0, 1), a count that does not fit, a family without an adapter or without experts,
            data missing, compensation where there is no bias or inside experts.

    Example:
        >>> model = tiny_bert()
        >>> small = tfvllm.shrink(model, ffn=0.5, heads=0.5, importance="taylor", data=(x, y))
        >>> small.count_params() < model.count_params(), small(x).shape
        (True, TensorShape([16, 2]))
    """
    return apply_plan(
        model,
        plan_shrink(
            model,
            heads=heads,
            ffn=ffn,
            experts=experts,
            layers=layers,
            width=width,
            vocabulary=vocabulary,
            importance=importance,
            data=data,
            compensate=compensate,
            allocation=allocation,
            adaptive=adaptive,
            round_to=round_to,
            limit=limit,
        ),
    )


def plan_shrink(
    model: Any,
    *,
    heads: Request = None,
    ffn: Request = None,
    experts: Request = None,
    layers: Request = None,
    width: Request = None,
    vocabulary: Request = None,
    importance: Any = "magnitude",
    data: Any = None,
    compensate: bool | str | None = None,
    allocation: str = "uniform",
    adaptive: bool = False,
    round_to: int = 16,
    limit: int = 64,
) -> Plan:
    """What `shrink` would keep, without building it. Arguments as for `shrink`.

    Example:
        >>> plan = tfvllm.pruning.plan_shrink(tiny_bert(), layers=1)
        >>> plan.layers["encoder"]
        [0]
    """
    adapter = adapter_for(model)
    refuse_quantised(model, "shrink")
    if allocation not in ("uniform", "global"):
        raise InputError(f"allocation={allocation!r}: expected 'uniform' or 'global'.")
    if adaptive and (allocation != "uniform" or heads is ffn is None):
        raise InputError(
            "adaptive=True shares out what heads= and ffn= leave; expected one of them, and allocation='uniform', "
            f"found heads={heads}, ffn={ffn}, allocation={allocation!r}."
        )
    if adaptive and experts is not None:
        raise InputError(
            f"adaptive=True weighs heads against neurons; expected experts=None, found {experts}. Remove experts in a "
            "call of its own."
        )
    plan = full_plan(model)
    if all(request is None for request in (heads, ffn, experts, layers, width, vocabulary)):
        raise InputError("nothing to remove: expected at least one of heads, ffn, experts, layers, width, vocabulary.")
    mixed = [b for b in adapter.blocks(model) if isinstance(b.feed_forward, Experts)]
    if experts is not None and not mixed:
        raise InputError(
            f"experts={experts}: expected a mixture of experts, found no block with experts; leave it out."
        )
    biased = [b for b in adapter.blocks(model) if _biased(b)]
    if compensate not in (None, True, False, "mean", "least_squares"):
        raise InputError(f"compensate={compensate!r}: expected 'mean', 'least_squares', True, False or None.")
    fitted = compensate == "least_squares"
    if compensate and not fitted and not biased:
        raise InputError(
            f"compensate={compensate!r}: the {adapter.family} family has no output bias to carry the mean; leave it "
            "unset, or take 'least_squares'."
        )
    if compensate and data is None:
        raise InputError(f"compensate={compensate!r} needs calibration data. Pass data=.")
    if compensate and mixed and (ffn, experts) != (None, None):
        raise InputError(
            f"compensate={compensate!r} makes up for nothing inside experts; expected neither ffn= nor experts=, found "
            f"ffn={ffn}, experts={experts}. Leave it out, or shrink twice."
        )
    inside = None if mixed else ffn  # what goes from inside experts is not made up for
    use_bias = data is not None and bool(biased) and compensate is not False and (heads, inside) != (None, None)
    needs_scores = any(request is not None for request in (heads, ffn, experts, layers, width)) or isinstance(
        vocabulary, int | float
    )
    wanted = {WIDTH: width, VOCABULARY: vocabulary, HEADS: heads, KV_HEADS: heads, FFN: ffn, EXPERTS: experts}
    units = [unit for unit, request in wanted.items() if request is not None]
    scores = (
        unit_scores(model, importance, data, fluctuation=use_bias, limit=limit, units=units) if needs_scores else {}
    )

    if layers is not None:
        _plan_layers(plan, layers, scores)
        plan.layers = {k: adapter.kept_layers(adapter.backbone(model), k, kept) for k, kept in plan.layers.items()}
    blocks = [b for b in adapter.blocks(model) if b.index in plan.layers[b.kind]]
    costs = _costs(adapter, model) if adaptive else {}
    of_heads = _head_sites(blocks, heads, scores, costs)
    of_neurons = _neuron_sites(blocks, ffn, scores, costs, round_to)
    of_experts = _expert_sites(blocks, experts, scores)
    if adaptive:
        adapt([*of_heads, *of_neurons])
    elif allocation == "global":
        compete(of_heads)
        compete(of_neurons)
        compete(of_experts)
    _plan_units(plan, adapter, of_heads, [*of_neurons, *of_experts])
    if width is not None:
        widths = {block.kind: block.hidden_width for block in blocks}
        if len({*widths.values()}) > 1:
            told = " and ".join(f"{size} in the {kind}" for kind, size in widths.items())
            raise InputError(f"width={width}: expected one width in the whole model, found {told}; leave it out.")
        total = blocks[0].hidden_width
        kept = resolve(width, total, "width", round_to=max(round_to, 2), minimum=2)
        if kept % 2:
            raise InputError(f"width={width}: {kept} channels; expected an even number.")
        plan.keep[WIDTH, ""] = best(scores[WIDTH, ""], kept)
    if vocabulary is not None:
        from tfvllm.pruning.vocabulary import plan_vocabulary

        plan_vocabulary(plan, model, vocabulary, scores.get((VOCABULARY, "")), data, round_to=1)
    if use_bias or fitted:
        _compensate(plan, adapter, model, blocks, data, limit, fitted)
    return plan


def _plan_layers(plan: Plan, request: Request, scores: Scores) -> None:
    for kind, indices in list(plan.layers.items()):
        wanted = request.get(kind) if isinstance(request, dict) else request
        if wanted is None:
            continue
        total = len(indices)
        if isinstance(wanted, Sequence):
            kept = sorted(int(i) for i in wanted)
            if not kept or len(set(kept)) != len(kept) or kept[0] < 0 or kept[-1] >= total:
                raise InputError(f"layers={list(wanted)}: expected distinct block indices from 0 to {total - 1}.")
            plan.layers[kind] = kept
        else:
            plan.layers[kind] = [int(i) for i in best(scores["layers", kind], resolve(wanted, total, "layers"))]


def _biased(block: Block) -> bool:
    """Whether it has output biases that can carry what removed units gave."""
    inside = block.feed_forward
    return block.attention.output.has_bias and (isinstance(inside, Experts) or inside.down.has_bias)


def _plan_units(plan: Plan, adapter: Adapter, heads: list[Site], others: list[Site]) -> None:
    if adapter.tied_heads:
        _tie(heads)
    for site in (*heads, *others):
        if site.count < len(site.scores):
            kept = best(site.scores, site.count)
            alone = site.attention is None
            keep = {(site.unit, site.place): kept} if alone else head_keep(site.attention, site.unit, kept)
            plan.keep.update(keep)
    if adapter.tied_heads:  # the shared bias is a weight of each stack's first block, which may itself be removed
        for (unit, place), kept in list(plan.keep.items()):
            kind, _, which = place.split(".") if unit == HEADS else ("", "", "")
            if which == "self":
                plan.keep[HEADS, f"{kind}.0.self"] = kept


def _costs(adapter: Adapter, model: Any) -> Mapping[tuple[str, str], int]:
    """Parameters of one unit, by (unit, place)."""
    costs: Counter[tuple[str, str]] = Counter()
    for weight in adapter.weights(adapter.backbone(model)):
        for axis, size in zip(weight.axes, weight.variable.shape):
            if axis is not None:
                costs[axis.unit, axis.place] += math.prod(weight.variable.shape) * axis.inner * axis.repeats // size
    return costs


def _head_sites(
    blocks: list[Block], request: Request, scores: Scores, costs: Mapping[tuple[str, str], int]
) -> list[Site]:
    sites = []
    for block, wanted in _requests(blocks, request, "heads"):
        for cross in (False, True):
            attention = block.cross_attention if cross else block.attention
            if attention is None or wanted is None:
                continue
            unit, place = head_unit(block, cross), attention.place
            group = 1 if unit == HEADS else attention.heads // attention.kv_heads
            asked = wanted
            if isinstance(wanted, int | np.integer) and not isinstance(wanted, bool) and group > 1:
                if wanted % group:
                    raise InputError(
                        f"heads={wanted}: {attention.heads} query heads share {attention.kv_heads} key/value heads; "
                        f"expected a multiple of {group}, whole groups."
                    )
                asked = int(wanted) // group
            cost = group * costs.get((HEADS, place), 0) + (costs.get((KV_HEADS, place), 0) if unit == KV_HEADS else 0)
            count = resolve(asked, attention.heads // group, "heads")
            channels = group * attention.head_dim
            sites.append(Site(unit, place, count, scores[unit, place], cost, channels, attention=attention))
    return sites


def _neuron_sites(
    blocks: list[Block], request: Request, scores: Scores, costs: Mapping[tuple[str, str], int], round_to: int
) -> list[Site]:
    sites = []
    for block, wanted in _requests(blocks, request, "ffn"):
        if wanted is not None:
            place = block.feed_forward.place
            count = resolve(wanted, block.ffn_width, "ffn", round_to=round_to)
            sites.append(Site(FFN, place, count, scores[FFN, place], costs.get((FFN, place), 0), step=round_to))
    return sites


def _expert_sites(blocks: list[Block], request: Request, scores: Scores) -> list[Site]:
    sites = []
    for block, wanted in _requests(blocks, request, "experts"):
        if wanted is not None and isinstance(block.feed_forward, Experts):
            place = block.feed_forward.place
            count = resolve(wanted, block.feed_forward.count, "experts")
            sites.append(Site(EXPERTS, place, count, scores[EXPERTS, place], cost=0))
    return sites


def _requests(blocks: list[Block], request: Request, what: str) -> list[tuple[Block, Any]]:
    """What is asked of each layer that blocks are made of; they may share one."""
    asked: dict[str, tuple[Block, Any]] = {}
    for block, wanted in zip(blocks, per_layer(request, len(blocks), what)):
        first, same = asked.setdefault(block.feed_forward.place, (block, wanted))
        if same != wanted:
            raise InputError(
                f"{what}: blocks {first.index} and {block.index} are calls of one layer; expected the same for both, "
                f"found {same} and {wanted}."
            )
    return list(asked.values())


def _tie(sites: list[Site]) -> None:
    """Self-attention heads of one stack share a position bias: they go together, by the sum of their scores."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        kind, _, which = site.place.split(".")
        if which == "self":
            groups.setdefault(kind, []).append(site)
    for kind, members in groups.items():
        counts = {site.count for site in members}
        if len(counts) > 1:
            raise InputError(
                f"heads: all {kind} blocks of this family share one position bias and must keep equally many heads; "
                f"got {sorted(counts)}. Give one value, and allocation='uniform' without adaptive."
            )
        total = np.sum([site.scores / max(float(np.mean(site.scores)), 1e-30) for site in members], axis=0)
        for site in members:
            site.scores = total


DAMPING = 0.01  # of the fit, times the mean of the diagonal (as SparseGPT's)


def _compensate(
    plan: Plan, adapter: Adapter, model: Any, blocks: list[Block], data: Any, limit: int, fitted: bool
) -> None:
    seen = UnitStatistics(adapter, model, joint=fitted).run(model, data, limit)
    names = {id(w.variable): w.name for w in adapter.weights(adapter.backbone(model))}
    for block in blocks:
        if block.call:
            continue
        inside = block.feed_forward
        sites = [] if isinstance(inside, Experts) else [(FFN, inside.place, inside.down)]
        sites += [(HEADS, a.place, a.output) for a in (block.attention, block.cross_attention) if a is not None]
        for unit, place, projection in sites:
            kept = plan.keep.get((unit, place))
            if kept is None or not (projection.has_bias or fitted):
                continue
            variable = stored(projection.layer, "kernel")
            kernel = effective(projection.layer, "kernel").astype(np.float64)
            kernel = kernel.reshape(-1, kernel.shape[-1])
            mean = seen.mean(unit, place).reshape(-1)
            units = block.ffn_width if unit == FFN else len(mean) // block.head_dim
            inner = len(mean) // units
            stay = (np.asarray(kept)[:, None] * inner + np.arange(inner)).reshape(-1)
            new = np.zeros_like(kernel)
            new[stay] = kernel[stay]
            if fitted:
                second = seen.products[unit, place] / max(seen.count[unit, place], 1.0)
                new[stay] = _fitted(kernel, second - np.outer(mean, mean) if projection.has_bias else second, stay)
                plan.kernels[names[id(variable)]] = new.reshape(variable.shape)
            if projection.has_bias:
                plan.bias[names[id(projection.layer.bias)]] = mean @ (kernel - new)


def _fitted(kernel: np.ndarray, moments: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """The weights [stay, outputs] nearest to `kernel` in what they give: least squares, damped towards kernel[stay].

    V minimises E|h W - h_stay V|^2 + d |V - W_stay|^2, so (M_ss + d I) V = M_s: W + d W_stay, with M = E[h h^T].
    """
    inner = moments[np.ix_(stay, stay)]
    damping = DAMPING * float(np.mean(np.diag(inner))) + 1e-12
    right = moments[stay] @ kernel + damping * kernel[stay]
    return np.linalg.solve(inner + damping * np.eye(len(stay)), right)


__all__ = ["KV_HEADS", "plan_shrink", "shrink"]
