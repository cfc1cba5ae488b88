"""Prometheus metrics under TF Serving's names, so that its dashboards and alerts go on working.

Needs prometheus-client (the extra [serve]); without it the server runs and counts nothing.
"""

PATH = "/monitoring/prometheus/metrics"  # TF Serving's default

_LATENCY_BUCKETS = tuple(10 * 1.8**i for i in range(33))  # microseconds, as TF Serving's
_SIZE_BUCKETS = tuple(float(2**i) for i in range(15))
_COUNTERS = {
    ":tensorflow:serving:request_count": ("The total number of requests.", ("model_name", "status")),
    ":tensorflow:serving:request_example_count_total": ("The total number of tensorflow.Examples.", ("model",)),
    ":tensorflow:cc:saved_model:load_attempt_count": (
        "The number of times a SavedModel was requested to be loaded.",
        ("model_path", "status"),
    ),
    ":tensorflow:serving:batching_session:wrapped_run_count": ("Total count of run calls on the wrapped session", ()),
}
_HISTOGRAMS = {
    ":tensorflow:serving:request_latency": (
        "Distribution of wall time (in microseconds) for Tensorflow Serving request.",
        ("model_name", "API", "entrypoint"),
        _LATENCY_BUCKETS,
    ),
    ":tensorflow:serving:runtime_latency": (
        "Distribution of wall time (in microseconds) for Tensorflow runtime.",
        ("model_name", "API", "runtime"),
        _LATENCY_BUCKETS,
    ),
    ":tensorflow:serving:request_example_counts": (
        "The number of tensorflow.Examples per request.",
        ("model",),
        _SIZE_BUCKETS,
    ),
    ":tensorflow:serving:batching_session:queuing_latency": (
        "Distribution of wall time spent (in microseconds) in queuing",
        (),
        _LATENCY_BUCKETS,
    ),
    ":tensorflow:serving:batching_session:processed_batch_size": (
        "Distribution of the rows in a run",
        ("model_name",),
        _SIZE_BUCKETS,
    ),
}


def available() -> bool:
    """Whether prometheus-client is installed."""
    import importlib.util

    return importlib.util.find_spec("prometheus_client") is not None


class Metrics:
    """The counters of one server. Each method is cheap and never raises."""

    def __init__(self):
        self._on = available()
        if not self._on:
            return
        from prometheus_client import CollectorRegistry, Histogram

        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(name, text, labels, buckets=buckets, registry=self._registry)
            for name, (text, labels, buckets) in _HISTOGRAMS.items()
        }
        self._children: dict[tuple[str, tuple[str, ...]], Histogram] = {}
        self._counts: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _COUNTERS}
        self._registry.register(self)

    # --- what happens ---

    def request(self, model: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
        """A request was answered."""
        if self._on:
            self._count(":tensorflow:serving:request_count", model, status)
            self._observe(":tensorflow:serving:request_latency", seconds * 1e6, model, api, entrypoint)

    def run(self, model: str, api: str, seconds: float) -> None:
        """TensorFlow ran for a request or a batch."""
        if self._on:
            self._observe(":tensorflow:serving:runtime_latency", seconds * 1e6, model, api, "TF1")

    def examples(self, model: str, count: int) -> None:
        """A Classify or Regress request had `count` examples."""
        if self._on:
            self._observe(":tensorflow:serving:request_example_counts", count, model)
            self._count(":tensorflow:serving:request_example_count_total", model, by=count)

    def batch(self, model: str, rows: int, requests: int, waited: float) -> None:
        """A batch of `requests` requests started after its first one had waited `waited` seconds."""
        if self._on:
            self._count(":tensorflow:serving:batching_session:wrapped_run_count")
            self._observe(":tensorflow:serving:batching_session:queuing_latency", waited * 1e6)
            self._observe(":tensorflow:serving:batching_session:processed_batch_size", rows, model)

    def load(self, path: str, status: str) -> None:
        """A version was loaded, or failed to."""
        if self._on:
            self._count(":tensorflow:cc:saved_model:load_attempt_count", path, status)

    # --- what is told ---

    def text(self) -> bytes | None:
        """The exposition text; None where prometheus-client is missing."""
        if not self._on:
            return None
        from prometheus_client import generate_latest

        # The library writes headers of counters with a _total that TF Serving's names do not have.
        lines = []
        for line in generate_latest(self._registry).decode().splitlines():
            if line.startswith("# ") and line.split()[2].removesuffix("_total") in _COUNTERS:
                line = line.replace("_total", "", 1)
            if "_created{" not in line and "_created " not in line:
                lines.append(line)
        return ("\n".join(lines) + "\n").encode()

    def collect(self):
        """The counters, for prometheus-client."""
        from prometheus_client.core import Metric

        for name, (text, labels) in _COUNTERS.items():
            metric = Metric(name, text, "counter")
            for values, count in list(self._counts[name].items()):
                metric.add_sample(name, dict(zip(labels, values)), count)
            yield metric

    def _observe(self, name: str, value: float, *labels: str) -> None:
        child = self._children.get((name, labels))  # the library's own look-up by labels takes a lock
        if child is None:
            histogram = self._histograms[name]
            child = self._children[name, labels] = histogram.labels(*labels) if labels else histogram
        child.observe(value)

    def _count(self, name: str, *labels: str, by: float = 1) -> None:
        counts = self._counts[name]
        counts[labels] = counts.get(labels, 0) + by
