"""The pipelines: named steps in order. The only place where order is decided."""

from collections.abc import Mapping
from typing import Any

from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.int8_ops import Range
from tfvllm.graph.rewriter import Rule, Step
from tfvllm.rules.absorb_key_value import AbsorbKeyValueProjections
from tfvllm.rules.algebra import FactorOut, JoinFactors, JoinTerms, Signs, SmallPowers
from tfvllm.rules.attention_without_onednn import AttentionWithoutOneDnn
from tfvllm.rules.batch_matmul_to_matmul import BatchMatMulToMatMul
from tfvllm.rules.bfloat16 import (
    CancelCasts,
    LowerBias,
    LowerLayerNorm,
    LowerProducts,
    LowerSoftmax,
    SinkCastBelowMask,
    SinkCasts,
)
from tfvllm.rules.collapse_casts import CollapseCasts
from tfvllm.rules.collapse_reshapes import CollapseReshapes, CollapseTransposes, TransposeToReshape
from tfvllm.rules.delete_dead import DeleteDead
from tfvllm.rules.drop_broadcasts import DropBroadcasts
from tfvllm.rules.drop_identities import DropIdentities
from tfvllm.rules.einsum_to_matmul import EinsumToMatMul
from tfvllm.rules.embedding_sums import KnownRow, PlainLookup, RowIntoTable
from tfvllm.rules.fold_constants import FoldConstants
from tfvllm.rules.fold_scale import FoldScale
from tfvllm.rules.fold_weights import FoldWeights
from tfvllm.rules.fuse_conv import FuseConvActivation, FuseConvBias, FuseConvResidual, FuseDepthwiseBias
from tfvllm.rules.fuse_matmul import FuseActivation, FuseGelu, FuseMatMulBias, FuseResidual
from tfvllm.rules.fuse_requantize import EmitBfloat16Output, FuseRequantize
from tfvllm.rules.head_transposes import OneTransposeForHeads
from tfvllm.rules.hoist_slices import HoistSlices
from tfvllm.rules.int8 import QuantizeProducts, QuantizeTables
from tfvllm.rules.integer_transposes import TransposesAsIntegers
from tfvllm.rules.keras_quantised import DequantiseProducts
from tfvllm.rules.layer_norm import FuseLayerNorm
from tfvllm.rules.linear_layers import BatchNormToAffine, JoinLinearLayers, ScaleIntoWeights, TermToBias
from tfvllm.rules.masked_softmax import MaskByAddition, MaskRowsAfterAttention
from tfvllm.rules.merge_duplicates import MergeDuplicates
from tfvllm.rules.merge_parallel_matmuls import MergeParallelMatMuls
from tfvllm.rules.pack_tokens import PackTokens
from tfvllm.rules.prepack_weights import PrepackWeights
from tfvllm.rules.proven_assertions import DropProvenAssertions
from tfvllm.rules.rewrite_bodies import RewriteBodies
from tfvllm.rules.rms_norm import CentreLayerNorm, GammaIntoWeights
from tfvllm.rules.rotary import RotateTogether, SignsIntoSine
from tfvllm.rules.shared_masks import SharedMask
from tfvllm.rules.sink_reshapes import SinkReshapeBias, SinkReshapePair, SinkReshapeResidual, SinkReshapeUnary
from tfvllm.rules.smooth_inputs import SmoothInputs
from tfvllm.rules.softmax import RecogniseSoftmax
from tfvllm.rules.split_outliers import SplitOutliers
from tfvllm.rules.swish import FuseSwish
from tfvllm.rules.transpose_matmul import FoldTransposeLeft, FoldTransposeRight, TransposedProduct
from tfvllm.rules.trim_padding import TrimPadding
from tfvllm.rules.unfuse_small_layer_norm import UnfuseSmallLayerNorm
from tfvllm.rules.unfuse_small_quantize import UnfuseSmallQuantize

__all__ = ["LAST", "between_int8", "lowering", "pipeline", "register", "smoothing"]

_registered: list[Rule] = []
LAST = "sizes"
"""The step that comes after lowering, too: its rules choose among kernels, and other rules know the one kernel only."""


def pipeline(precision: str = "float32") -> list[Step]:
    """The steps of `simplify`, in order; rules that users registered come before the fusing steps.

    Args:
        precision: what the graph is lowered to afterwards: only then do weights that Keras quantised become floats.
    """
    unpack = precision != "float32"
    clean = (DropIdentities(), FoldConstants(), MergeDuplicates(), DeleteDead())
    return [
        Step("clean", clean),
        Step("assertions", (DropProvenAssertions(), DeleteDead())),
        Step("quantised", (DequantiseProducts(unpack),)),
        Step(
            "linear",
            (
                *(PlainLookup(), DropBroadcasts(), EinsumToMatMul(), BatchMatMulToMatMul()),
                *(SinkReshapeUnary(), SinkReshapeBias(), SinkReshapePair(), FoldScale()),
            ),
        ),
        Step(
            "algebra",
            (
                *(CollapseCasts(), Signs(), SmallPowers(), FactorOut(), JoinFactors(), BatchNormToAffine()),
                *(ScaleIntoWeights(), TermToBias(), JoinTerms(), JoinLinearLayers(), KnownRow(), RowIntoTable()),
            ),
        ),
        Step("layout", (CollapseReshapes(), CollapseTransposes(), TransposeToReshape(), *clean)),
        Step(
            "attention",
            (
                *(TransposedProduct(), FoldTransposeLeft(), FoldTransposeRight()),
                *(RecogniseSoftmax(), MaskRowsAfterAttention()),
            ),
        ),
        Step(
            "norms",
            (
                *(FuseLayerNorm(), CentreLayerNorm(), GammaIntoWeights(), SinkReshapePair(), SinkReshapeUnary()),
                *(SinkReshapeResidual(), CollapseReshapes(), *clean),
            ),
        ),
        Step("demand", (HoistSlices(), AbsorbKeyValueProjections()), repeat=False),
        Step("merge", (MergeParallelMatMuls(),), repeat=False),
        Step("heads", (OneTransposeForHeads(), SignsIntoSine(), RotateTogether(), MergeDuplicates())),
        Step("padding", (TrimPadding(), PackTokens(), MaskByAddition()), repeat=False),
        Step("user", tuple(_registered)),
        Step(
            "fuse",
            (
                *(FuseMatMulBias(), FuseGelu(), FuseActivation(), FuseResidual()),
                *(FuseConvBias(), FuseDepthwiseBias(), FuseConvActivation(), FuseConvResidual(), FuseSwish()),
            ),
        ),
        Step("weights", (FoldWeights(unpack), *clean)),
        Step("bodies", (RewriteBodies(),), repeat=False),
        Step(
            LAST,
            (
                *(
                    UnfuseSmallLayerNorm(),
                    SharedMask(),
                    AttentionWithoutOneDnn(),
                    TransposesAsIntegers(),
                    UnfuseSmallQuantize(),
                ),
                PrepackWeights(),
            ),
            repeat=False,
        ),
    ]


def lowering(precision: str, ranges: Mapping[str, Range | None] | None = None, guarantee: Any = None) -> list[Step]:
    """The steps that lower a simplified float32 graph to another precision; none for float32.

    Args:
        ranges: for int8: name of a product -> what the smallest and largest byte of its input stand for; None
            for a table.
        guarantee: for int8: what was measured of the products.
    """
    clean = (DropIdentities(), FoldConstants(), MergeDuplicates(), DeleteDead())
    if precision == "bfloat16":
        lower: tuple[Rule, ...] = (
            *(LowerProducts(), LowerBias(), SinkCasts(), SinkCastBelowMask(), CancelCasts(), LowerLayerNorm()),
            LowerSoftmax(),
        )
    elif precision == "int8":
        products = {n: span for n, span in (ranges or {}).items() if span is not None}
        tables = [n for n in ranges or {} if n not in products]
        promise = guarantee or Approximate()
        lower = (QuantizeProducts(products, promise), QuantizeTables(tables, promise), FuseRequantize())
    else:
        return []
    return [Step(precision, (*lower, MergeDuplicates())), Step("weights", (FoldWeights(), *clean))]


def between_int8() -> list[Step]:
    """The steps after int8 that make what attention computes between products in int8 bfloat16."""
    lower = (LowerProducts(weights=False), EmitBfloat16Output(), SinkCasts(), SinkCastBelowMask(), CancelCasts())
    clean = (DropIdentities(), FoldConstants(), MergeDuplicates(), DeleteDead())
    return [Step("activations", (*lower, LowerSoftmax(), MergeDuplicates())), Step("weights", clean)]


def smoothing(factors: Mapping[str, Any], outliers: Mapping[str, Any]) -> list[Step]:
    """The steps before int8 that take from activations what would cost all others their steps.

    Args:
        factors: name of a node whose channels are scaled -> float32[channels]; see `SmoothInputs`.
        outliers: name of a product -> channels of its input that are computed apart; see `SplitOutliers`.
    """
    clean = (DropIdentities(), FoldConstants(), MergeDuplicates(), DeleteDead())
    rules = (SmoothInputs(factors), SplitOutliers(outliers))
    return [Step("smooth", rules), Step("weights", (FoldWeights(), *clean))]


def register(rule: Rule) -> Rule:
    """Adds a rule of the user's to every later `simplify`; returns it."""
    _registered.append(rule)
    return rule
