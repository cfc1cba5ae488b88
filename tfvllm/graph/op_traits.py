"""What is true of an op, by its name: one table for all that asks.

A rule that needs fewer ops, or more, makes its set of these and says why.
"""

# ------------------------------------------------------------------------------------------------ element by element

ADDITIONS = frozenset({"AddV2", "Add"})
ARITHMETIC = ADDITIONS | {"Sub", "Mul", "RealDiv", "Maximum", "Minimum"}
"""Two operands of one type, and a result of it."""

BINARY = ARITHMETIC | {"Pow", "SquaredDifference"}

UNARY = frozenset(
    (
        *("Relu", "Relu6", "Elu", "Selu", "LeakyRelu", "Tanh", "Sigmoid", "Erf", "Erfc", "Exp", "Expm1", "Log"),
        *("Log1p", "Sqrt", "Rsqrt", "Square", "Reciprocal", "Neg", "Abs", "Sign", "Softplus", "Softsign", "Sin", "Cos"),
        "Cast",
    )
)
"""One operand, and a result that is another number."""

COMPARISONS = frozenset({"Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual"})
LOGICAL = frozenset({"LogicalAnd", "LogicalOr", "LogicalNot"})

COPIES = frozenset({"Identity", "StopGradient"})
IDENTITIES = COPIES | {"Snapshot", "PreventGradient"}
"""They give back what they are given. Keras writes the first two inside its layers."""

ELEMENTWISE = UNARY.union(
    *(BINARY, COMPARISONS, LOGICAL, COPIES),
    *(("SelectV2", "_MklSwish", "Inv"), ("Floor", "Ceil", "Round"), ("IsNan", "IsInf", "IsFinite")),
    ("ZerosLike", "OnesLike"),
)
"""Each element of the result comes from the elements at its place in the operands, which are broadcast."""

COMMUTATIVE = (ARITHMETIC - {"Sub", "RealDiv"}) | {"SquaredDifference", "LogicalAnd", "LogicalOr", "Equal", "NotEqual"}
"""Two operands that may change places."""

# --------------------------------------------------------------------------------------------------- matrix products

MATMULS = frozenset({"MatMul", "_FusedMatMul"})
"""Of two matrices. What is fused with the product follows its first two operands."""

BATCH_MATMULS = frozenset({"BatchMatMulV2", "BatchMatMul"})
"""Of stacks of matrices, in one type. The second comes in old graphs only, and does not broadcast."""

# ------------------------------------------------------------------------------------------------ along some axes

ALONG_LAST = frozenset({"BiasAdd", "Softmax", "LogSoftmax", "_MklLayerNorm"})
"""Row by row: over the last axis of the first operand, whose shape the result has."""

REDUCTIONS = frozenset({"Mean", "Sum", "Max", "Min", "Prod"})
LOGICAL_REDUCTIONS = frozenset({"Any", "All"})
"""Over the axes that their second operand names; `keep_dims` leaves those as axes of one element."""

# ------------------------------------------------------------------------------------- elements moved, none computed

RESHAPES = frozenset({"Reshape", "ExpandDims", "Squeeze"})
"""The same elements in the same order, in another shape."""

VIEWS = RESHAPES | {"StridedSlice", "BroadcastTo"}
"""An axis of the result that is the whole of an axis of the operand has its elements in their order."""

SLICES = frozenset({"Slice", "StridedSlice"})
PARTS = frozenset({"Split", "SplitV", "Unpack"})
"""Several results, cut from one operand along one axis."""

LOOKUPS = frozenset({"GatherV2", "ResourceGather"})
"""Rows of a table, the first operand; which ones, the second says."""

# -------------------------------------------------------------------------------------------------------------- others

SHAPE_ONLY = frozenset({"Shape", "Size", "Rank"})
"""They read no element."""

FUSED_ACTIVATIONS = frozenset({"Relu", "Relu6", "Elu", "Tanh", "Sigmoid", "GeluExact", "GeluApproximate", "LeakyRelu"})
"""What `fused_ops` calls the activations that oneDNN's products apply to their result."""
