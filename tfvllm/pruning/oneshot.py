"""Pruning a trained model at once, with a calibration set and without training."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.families import adapter_for
from tfvllm.families.base import Block
from tfvllm.pruning import scores
from tfvllm.pruning.capture import Call, batches, block_calls, listener, padding_mask, token_rows
from tfvllm.pruning.prunable import Prunable, PruneKernels, PruningPolicy, prunable_weights

METHODS = ("magnitude", "wanda", "sparsegpt")


def sparsify(
    model: Any,
    sparsity: float | Mapping[str, float] = 0.5,
    *,
    method: str = "sparsegpt",
    data: Any = None,
    sparsity_m_by_n: tuple[int, int] | None = None,
    policy: PruningPolicy | None = None,
    limit: int = 64,
) -> dict[str, float]:
    """Zeroes weights of a trained model, in place, frozen ones too: nothing is trained here.

    For keras-nlp models the products inside the blocks are pruned, block by block from below, each calibrated on
    what the pruned blocks below it give (as SparseGPT and Wanda do); elsewhere every Dense and EinsumDense at once.

    Args:
        sparsity: share of zeros; or weight-name patterns with a share each, first match, no match stays dense.
        method: "magnitude" (each weight by itself, TFMOT's rule), "wanda" (within each output), "sparsegpt" (the rest
            is adjusted to make up for what goes).
        data: calibration batches as for `fit`; not needed for "magnitude".
        sparsity_m_by_n: (m, n) zeros in every n consecutive inputs instead of a share.
        policy: which layers; default `PruneKernels`.
        limit: calibration batches used at most.

    Returns:
        Share of zeros by weight name.

    Raises:
        InputError: an unknown method, data missing, a share outside [0, 1), no 0 < m < n, a layer with LoRA (merge it
            first) or one that Keras has quantised.

    Example:
        >>> model = tiny_bert()
        >>> shares = tfvllm.pruning.sparsify(model, 0.5, method="wanda", data=(x, y))
        >>> set(shares.values())
        {0.5}
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    if method != "magnitude" and data is None:
        raise InputError(f"method={method!r} needs calibration data. Pass data=, a few hundred rows are enough.")
    for wanted in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        if not 0.0 <= wanted < 1.0:
            raise InputError(f"sparsity={wanted}: expected a share in [0, 1).")
    policy = PruneKernels() if policy is None else policy
    calibration = [] if method == "magnitude" else [x for x, _, _ in batches(model, data, limit=limit)]
    done: dict[str, float] = {}
    stages = _stages(model, policy)
    blocks = [block for block, _, _ in stages if block is not None]
    walk = block_calls(model, blocks, calibration) if calibration and blocks else None
    whole: list[Call] = [((x,), {"training": False}) for x in calibration]
    for block, kind, groups in stages:
        runs, calls = (model, whole) if walk is None else (block, next(walk))
        for targets in groups:
            wanted_shares = [(target, _share(target.name, sparsity)) for target in targets]
            chosen = [(target, share) for target, share in wanted_shares if share is not None]
            if not chosen:
                continue
            inputs: dict[int, np.ndarray] = {}
            if calibration:
                inputs = _second_moments(runs, calls, [t for t, _ in chosen], calibration, kind, method)
            for target, share in chosen:
                done[target.name] = _prune(target, share, method, sparsity_m_by_n, inputs.get(id(target.variable)))
    if not done:
        raise InputError(
            "nothing was pruned: expected Dense-like layers" + (" whose names match." if sparsity else ".")
        )
    return done


def _share(name: str, sparsity: float | Mapping[str, float]) -> float | None:
    if not isinstance(sparsity, Mapping):
        return sparsity
    return next((share for pattern, share in sparsity.items() if fnmatch.fnmatch(name, pattern)), None)


def _stages(model: Any, policy: PruningPolicy) -> list[tuple[Any, str, list[list[Prunable]]]]:
    """Blocks in the order of the data, their kind, and the weights of each to prune together: those of its attention,
    then those of its feed-forward. Models without an adapter: one stage, of no block (None).
    """
    try:
        blocks = adapter_for(model).blocks(model)
    except InputError:
        dense = keras.layers.Dense | keras.layers.EinsumDense
        return [(None, "", [[t for t in prunable_weights(model, policy) if isinstance(t.layer, dense)]])]

    def of(block: Block, projections: Any) -> list[Prunable]:
        layers = {id(p.layer) for p in projections}
        return [t for t in prunable_weights(block.layer, policy) if id(t.layer) in layers]

    stages = []
    for block in blocks:
        if block.call:  # of a layer that has been pruned
            continue
        groups = [block.attention.projections, block.feed_forward.projections]
        if block.cross_attention is not None:
            groups.insert(1, block.cross_attention.projections)
        stages.append((block.layer, block.kind, [of(block, group) for group in groups]))
    return stages


def _second_moments(
    runs: Any, calls: list[Call], targets: list[Prunable], calibration: list[Any], kind: str, method: str
) -> dict[int, np.ndarray]:
    """Sum of x x^T of what each target's layer reads, over real tokens: [inputs, inputs], for Wanda its diagonal.

    Args:
        runs: what holds the targets, a block or the whole model, and `calls` how it is called on each batch.
    """
    by_layer = {id(t.layer): t for t in targets}

    def measure(key: Any, inputs: Any, outputs: Any, given: Any) -> Any:
        # A kernel of several axes reads the last axes as one; padding is by [batch, length], the first two.
        size = by_layer[key].view.matrix_shape[0]
        rows = token_rows(inputs, padding_mask(given[0], kind) if kind else None)
        rows = tf.reshape(rows, [-1, size])
        if method == "wanda":
            return tf.reduce_sum(tf.square(rows), 0)
        return tf.matmul(rows, rows, transpose_a=True)

    def run(given: Any) -> None:
        _, (args, kwargs) = given
        runs(*args, **kwargs)

    listen = listener(runs, {id(t.layer): t.layer for t in targets}, measure, run)
    moments: dict[int, np.ndarray] = {}
    for given in zip(calibration, calls):
        for key, found in listen(given).items():
            variable = id(by_layer[key].variable)
            moments[variable] = moments.get(variable, 0.0) + np.asarray(found, np.float64)
    return moments


def _prune(
    target: Prunable, share: float, method: str, m_by_n: tuple[int, int] | None, moment: np.ndarray | None
) -> float:
    value = np.asarray(target.variable, np.float32)
    matrix = target.view.to_matrix(value)
    if method == "sparsegpt" and moment is not None:
        new, mask = scores.sparsegpt(matrix, moment, None if m_by_n else share, m_by_n=m_by_n)
    else:
        if method == "wanda" and moment is not None:
            score = scores.wanda(matrix, np.sqrt(moment))
        else:
            score = scores.magnitude(matrix)
        by = "output" if method == "wanda" else "tensor"
        kept = scores.m_by_n_mask(score, *m_by_n) if m_by_n else scores.mask_from_scores(score, share, by=by)
        mask = np.asarray(kept)
        new = matrix * mask
    target.variable.assign(target.view.from_matrix(np.ascontiguousarray(new, np.float32)))
    return 1.0 - float(mask.mean())
