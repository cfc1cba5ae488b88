"""TF Serving's REST and gRPC protocols in front of SavedModels.

status        error codes, and what they are in HTTP and gRPC
tensors       JSON <-> numpy, as TF Serving reads and writes it (pure functions)
servable      one SavedModel, loaded as TF Serving loads it: a session and its signatures
loop          the event loop
executor      where servables run: in this process, or in worker processes that may die
batching      many small requests -> one run
config        models.config and batching_parameters.txt
manager       which versions are loaded, hot reload, labels
core          Predict, Classify, Regress, MultiInference, status, metadata: what both protocols share
rest, rpc     the two protocols
metrics       Prometheus, under TF Serving's names
server        all of it, started and stopped
lint, kit     would a stock TF Serving load it; what to start one with (deployment, served_ops)
"""

__all__ = [
    "batching",
    "config",
    "core",
    "deployment",
    "examples",
    "executor",
    "kit",
    "lint",
    "loop",
    "manager",
    "metrics",
    "rest",
    "rpc",
    "run",
    "security",
    "servable",
    "served_ops",
    "server",
    "status",
    "tensors",
]
