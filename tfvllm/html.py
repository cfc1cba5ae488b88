"""Self-contained HTML pages: a shell for light, dark and phones, Mermaid diagrams, plots as inline SVG. No network."""

import base64
import html
import importlib.resources
import io
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MERMAID = "mermaid-11.17.2.min.js.gz"  # npm package `mermaid` (MIT, licence text beside it), gzipped as published

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2128; --quiet: #5c6570; --line: #d5dae0; --panel: #f5f7f9;
  --s1: #1f6fb4; --s2: #c2570c; --s3: #2b8a4b; --s4: #8a4fbf; --s5: #b3364b; --s6: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e3e8ee; --quiet: #9aa5b1; --line: #343c45;
  --panel: #1c2229; --s1: #62aef0; --s2: #f09a58; --s3: #62c583; --s4: #bf94ec; --s5: #f0788c; --s6: #a3adb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei",
    "Noto Sans CJK SC", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.quiet { color: var(--quiet); }
.note { border-left: 4px solid var(--s2); background: var(--panel); padding: .6rem .8rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { max-width: 28rem; } td:not(:first-child):not(.number) { min-width: 9rem; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
p { overflow-wrap: break-word; }
pre, code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85rem; }
pre { background: var(--panel); padding: .7rem; overflow-x: auto; border-radius: 4px; }
details { margin: .6rem 0; } summary { cursor: pointer; }
figure { margin: 1rem 0; overflow-x: auto; }
figure > svg { max-width: 100%; min-width: 26rem; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--quiet); font-size: .9rem; }
.diagram { max-height: 80vh; overflow: auto; border: 1px solid var(--line); border-radius: 4px; padding: .5rem; }
.diagram svg { max-width: none; display: block; margin: 0 auto; cursor: zoom-in; }
.diagram.fitted svg { max-width: 100%; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; padding: 0;
  list-style: none; }
.cards li { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.35rem; }
.sides { margin: 1rem 0; border-top: 1px solid var(--line); }
.sides > div { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: .2rem 1rem; }
.sides h4 { margin: .4rem 0 0; font-size: .85rem; color: var(--quiet); }
.sides p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 34rem) { table { font-size: .84rem; } th, td { padding: .25rem .4rem; }
  td:not(.number), td:not(:first-child):not(.number) { min-width: 6rem; } }
"""

_DRAW = """
(async () => {
  const sources = [...document.querySelectorAll("pre.mermaid-source")];
  if (!sources.length || typeof DecompressionStream === "undefined") return;  // the source text stays readable
  const packed = document.getElementById("mermaid-gzip").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let drawn = 0;
  const show = (figure, fitted, event) => {  // the whole width at once, or full size around where one clicked
    const box = figure.getBoundingClientRect();
    const x = event ? (event.clientX - box.left) / box.width : 0.5;
    const y = event ? (event.clientY - box.top + figure.scrollTop) / figure.scrollHeight : 0;
    figure.classList.toggle("fitted", fitted);
    figure.scrollLeft = x * figure.scrollWidth - figure.clientWidth / 2;
    figure.scrollTop = event ? y * figure.scrollHeight - figure.clientHeight / 2 : 0;
  };
  const draw = async (source) => {
    const figure = source.closest(".diagram-block").querySelector(".diagram");
    try {
      const result = await mermaid.render("diagram" + drawn++, source.textContent);
      figure.innerHTML = result.svg;
      figure.hidden = false;
      show(figure, figure.firstElementChild.clientWidth < 1.6 * figure.clientWidth);
      figure.onclick = (event) => show(figure, !figure.classList.contains("fitted"), event);
    } catch (error) {
      source.closest("details").open = true;
    }
  };
  const all = async () => {
    mermaid.initialize({ startOnLoad: false, securityLevel: "strict", theme: dark.matches ? "dark" : "default",
      maxTextSize: 5000000, maxEdges: 50000, flowchart: { useMaxWidth: false } });
    for (const source of sources) {
      const fold = source.closest("details.fold");
      if (!fold || fold.open) await draw(source);
      else fold.addEventListener("toggle", () => draw(source), { once: true });
    }
  };
  dark.addEventListener("change", all);
  await all();
})();
"""


def escape(text: Any) -> str:
    """`text` as HTML text."""
    return html.escape(str(text))


def page(title: str, body: str) -> str:
    """A whole HTML page around `body` (HTML). Mermaid is put in only where the body has a `diagram`."""
    scripts = ""
    if "mermaid-source" in body:
        packed = base64.b64encode(importlib.resources.files("tfvllm").joinpath("assets", MERMAID).read_bytes()).decode()
        scripts = f'<script type="text/plain" id="mermaid-gzip">{packed}</script>\n<script>{_DRAW}</script>\n'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n</main>\n{scripts}</body>\n</html>\n"
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls sideways on a phone. Cells that begin with a digit or a sign are set right."""
    rows = [[str(cell) for cell in row] for row in rows]
    right = [
        all(not row[i] or re.match(r"[-+±−]?\d", row[i]) or row[i] == "–" for row in rows) and bool(rows)
        for i in range(len(headers))
    ]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{escape(cell)}</{tag}>' if is_number else f"<{tag}>{escape(cell)}</{tag}>"
            for cell, is_number in zip(row, right)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells("th", list(headers))}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def cards(items: Iterable[tuple[str, str]]) -> str:
    """Headline figures: `(figure, what it is)`."""
    inside = "".join(f"<li><b>{escape(figure)}</b>{escape(label)}</li>" for figure, label in items)
    return f'<ul class="cards">{inside}</ul>'


def side_by_side(parts: Iterable[tuple[str, str]], caption: str = "") -> str:
    """Texts beside each other, where the screen is narrow below each other: `(what it is, text)`, lines kept."""
    inside = "".join(
        f"<section><h4>{escape(label)}</h4><p dir='auto'{_language(text)}>{escape(text)}</p></section>"
        if text.strip()
        else f"<section><h4>{escape(label)}</h4><p class='quiet'>(nothing)</p></section>"
        for label, text in parts
    )
    under = f"<p class='quiet'>{escape(caption)}</p>" if caption else ""
    return f'<div class="sides"><div>{inside}</div>{under}</div>'


def _language(text: str) -> str:
    # Han characters are drawn and broken into lines by their language, which a page in English does not say.
    if re.search("[\u3040-\u30ff]", text):
        return " lang='ja'"
    if re.search("[\uac00-\ud7af]", text):
        return " lang='ko'"
    return " lang='zh'" if re.search("[\u4e00-\u9fff]", text) else ""


def diagram(source: str, caption: str, *, folded: bool = False) -> str:
    """A Mermaid diagram. Its text stays on the page, folded, and is what one sees where scripts are off.

    `folded=True` draws it only once the reader opens it: large graphs take seconds.
    """
    block = (
        f'<div class="diagram-block"><div class="diagram" hidden></div>'
        f'<details><summary>Mermaid source</summary><pre class="mermaid-source">{escape(source)}</pre></details></div>'
    )
    if folded:
        return f'<details class="fold"><summary>{escape(caption)}</summary>{block}</details>'
    return f"<figure>{block}<figcaption>{escape(caption)}</figcaption></figure>"


# matplotlib draws in these colours; the page's own, which follow light and dark, take their place
_INK = "#010203"
SERIES = ("#11f001", "#11f002", "#11f003", "#11f004", "#11f005", "#11f006")


def plot(draw: Callable[[Any], None], *, caption: str, size: tuple[float, float] = (6.4, 3.2)) -> str:
    """A matplotlib plot as an inline SVG figure that is legible in light and in dark.

    Args:
        draw: gets the axes and draws on them; use the colours of `SERIES` for data.
        caption: said under the plot, and to screen readers.
        size: width and height in inches at 96 pixels each; narrower screens scale it down.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": caption,
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.prop_cycle": cycler(color=list(SERIES)),
        "axes.grid": True,
        "grid.alpha": 0.18,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **{name: _INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
        "grid.color": _INK,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # its style would leak into the page
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    for i, colour in enumerate(SERIES, start=1):
        svg = svg.replace(colour, f"var(--s{i})")
    # ids must differ between the plots of a page
    prefix = f"p{zlib.crc32(caption.encode()):08x}"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
