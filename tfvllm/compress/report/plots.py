"""The plots of reports: each takes figures by the name of a model or step and gives an inline SVG figure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tfvllm import html

_COLOURS = len(html.SERIES)


def bars(series: Mapping[str, Sequence[float]], groups: Sequence[str], *, label: str, caption: str) -> str:
    """Bars side by side: one of each model in every group."""

    def draw(axes: Any) -> None:
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            places = [x + i * width for x in range(len(values))]
            axes.bar(places, values, width, label=name, color=html.SERIES[i % _COLOURS])
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], groups)
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=10)

    return html.plot(draw, caption=caption)


class Point(NamedTuple):
    """A model: how fast, how good, how large."""

    x: float
    y: float
    bytes: int


def trade(points: Mapping[str, Point], *, labels: tuple[str, str], caption: str) -> str:
    """Quality against speed with the size as area. `labels` are of x and y."""
    largest = max(point.bytes for point in points.values())

    def draw(axes: Any) -> None:
        for i, (name, (x, y, size)) in enumerate(points.items()):
            axes.scatter([x], [y], s=30 + 300 * (size / largest), color=html.SERIES[i % _COLOURS],
                         label=f"{name}, {size / 1e6:.1f} MB", alpha=0.8)  # fmt: skip
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.margins(0.2)
        for marker in axes.legend(fontsize=10).legend_handles:
            marker.set_sizes([40])

    return html.plot(draw, caption=caption)


def sizes(of: Mapping[str, int]) -> str:
    """Bars of bytes on disk."""

    def draw(axes: Any) -> None:
        for i, (name, size) in enumerate(of.items()):
            axes.barh([name], [size / 1e6], color=html.SERIES[i % _COLOURS])
        axes.invert_yaxis()
        axes.set_xlabel("MB on disk")

    return html.plot(draw, caption="Size on disk", size=(6.4, 0.6 + 0.45 * len(of)))


def curves(series: Mapping[str, Sequence[float]], *, label: str, caption: str, wide: bool = False) -> str:
    """A line for each step over its epochs; NaN is a gap. `wide`: logarithmic where a factor of ten is between them."""
    known = [value for values in series.values() for value in values if math.isfinite(value)] if wide else []

    def draw(axes: Any) -> None:
        for i, (name, values) in enumerate(series.items()):
            axes.plot(range(1, len(values) + 1), values, marker="o", label=name, color=html.SERIES[i % _COLOURS])
        if known and 0 < 10 * min(known) < max(known):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        if wide:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.legend(fontsize=10)

    return html.plot(draw, caption=caption)
