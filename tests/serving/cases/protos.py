"""Requests and answers of the gRPC API as text protos, from what varies in them."""


def spec(name="default", signature=None, version=123) -> str:
    """A model_spec."""
    return (
        f"model_spec {{ name: '{name}' "
        + (f"signature_name: '{signature}' " if signature is not None else "")
        + (f"version {{ value: {version} }} " if version is not None else "")
        + "}\n"
    )


def floats(key: str, value: float, *shape: int, field="inputs") -> str:
    """A float tensor of one value."""
    dims = " ".join(f"dim {{ size: {size} }}" for size in shape)
    return f"{field} {{ key: '{key}' value {{ dtype: DT_FLOAT tensor_shape {{ {dims} }} float_val: {value} }} }}\n"


def example(x: float) -> str:
    """An input of one tf.Example with the feature x."""
    return (
        "input { example_list { examples { features { feature { key: 'x' value { float_list { value: "
        f"{x} }} }} }} }} }} }} }}\n"
    )


def task(signature: str, method: str, name="default") -> str:
    """A task of a MultiInference request."""
    return f"tasks {{ method_name: '{method}' {spec(name, signature, None)} }}\n"


def regressed(signature: str, *values: float, name="default") -> str:
    """A result of one regression."""
    rows = " ".join(f"regressions {{ value: {value} }}" for value in values)
    return f"results {{ {spec(name, signature)} regression_result {{ {rows} }} }}\n"


def scored(*pairs: tuple[str, float]) -> str:
    """A tf.Example with the features class and score."""
    classes = " ".join(f"value: '{label}'" for label, _ in pairs)
    scores = " ".join(f"value: {score}" for _, score in pairs)
    return (
        f"features {{ feature {{ key: 'class' value {{ bytes_list {{ {classes} }} }} }} "
        f"feature {{ key: 'score' value {{ float_list {{ {scores} }} }} }} }}"
    )


def output(value: float) -> str:
    """A tf.Example with the feature output."""
    return f"features {{ feature {{ key: 'output' value {{ float_list {{ value: {value} }} }} }} }}"


def listed(*examples: str, context: str | None = None) -> str:
    """An input of several tf.Examples."""
    kind = "example_list" if context is None else "example_list_with_context"
    rows = " ".join(f"examples {{ {row} }}" for row in examples)
    shared = "" if context is None else f"context {{ {context} }} "
    return f"input {{ {kind} {{ {shared}{rows} }} }}\n"


def classified(*rows: tuple[tuple[str, float], ...]) -> str:
    """The result of a Classify call."""
    listed_rows = (
        "classifications { "
        + " ".join(
            "classes { " + (f"label: '{label}' " if label else "") + f"score: {score} }}" for label, score in row
        )
        + " }"
        for row in rows
    )
    return f"result {{ {' '.join(listed_rows)} }}\n"


def regressions(*values: float) -> str:
    """The result of a Regress call."""
    return f"result {{ {' '.join(f'regressions {{ value: {value} }}' for value in values)} }}\n"
