"""Methods of layers that are listened to, or stood in for, while a model runs."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Hook = Callable[..., Any]  # is given the method and its arguments, and returns what the caller shall get


def call_of(layer: Any) -> str:
    """The method by which Keras runs `layer`."""
    return "call" if getattr(layer, "quantization_mode", None) is None else "quantized_call"


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first input of a call; of inputs that come together (T5Gemma's decoder) the first."""
    first = args[0] if args else next(iter(kwargs.values()))
    return first[0] if isinstance(first, (tuple, list)) else first


# Taps are set on the layer while it runs. Replicas of one model run in threads of their own, so each thread sees only
# the hooks it set, and a method is put back when the last thread leaves.
_lock = threading.Lock()
_installed: dict[tuple[int, str], list[Any]] = {}  # [uses, the attribute that was there (or None)]
_hooks = threading.local()


@contextlib.contextmanager
def hooked(layer: Any, method: str, hook: Hook) -> Iterator[None]:
    """While it lasts, `layer.method` goes through `hook` in this thread. Of several hooks the last one is outermost."""
    key = (id(layer), method)
    mine: dict[tuple[int, str], list[Hook]] = _hooks.__dict__.setdefault("by_key", {})
    with _lock:
        if key not in _installed:
            own = vars(layer).get(method)
            _installed[key] = [0, own]
            vars(layer)[method] = _dispatch(key, own or getattr(layer, method))
        _installed[key][0] += 1
    mine.setdefault(key, []).append(hook)
    try:
        yield
    finally:
        mine[key].pop()
        with _lock:
            entry = _installed[key]
            entry[0] -= 1
            if entry[0] == 0:
                del _installed[key]
                if entry[1] is None:
                    vars(layer).pop(method, None)
                else:
                    vars(layer)[method] = entry[1]


def _dispatch(key: tuple[int, str], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        inner = method
        hooks: Mapping[Any, list[Hook]] = getattr(_hooks, "by_key", {})
        for hook in hooks.get(key, ()):
            inner = functools.partial(hook, inner)
        return inner(*args, **kwargs)

    return called
