__all__ = [
    "attention",
    "beam",
    "cache",
    "generator",
    "kernels",
    "loop",
    "network",
    "sampling",
    "stops",
    "text",
    "translator",
    "weights",
]
