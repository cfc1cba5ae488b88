"""What a SavedModel's folder holds, read and written without Keras: protos, weights, manifest, versions, warm-up."""

__all__ = [
    "fresh",
    "manifest",
    "messages",
    "parity",
    "protos",
    "read",
    "text_ops",
    "versions",
    "warm_requests",
    "warmup",
    "write",
]
