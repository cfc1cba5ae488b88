"""Pages that need no network, in light and in dark, and whose text cannot break out."""

import base64
import gzip
import re

import pytest

import tfvllm
from tests import browser
from tests.tiny_models import bert_classifier
from tfvllm import html


def draw(axes):
    axes.plot([1, 2, 3], [3, 1, 2], label="a < b & c")
    axes.legend()


def test_a_page_without_diagrams_carries_no_script():
    page = html.page("Title & <more>", "<p>text</p>")
    assert "<title>Title &amp; &lt;more&gt;</title>" in page and "<script" not in page
    assert page.startswith("<!doctype html>")


def test_a_diagram_brings_mermaid_along_as_published():
    page = html.page("t", html.diagram('flowchart TD\n  a["<b>x</b>"] --> b', "A graph"))
    packed = re.search(r'id="mermaid-gzip">([^<]+)</script>', page).group(1)
    code = gzip.decompress(base64.b64decode(packed)).decode()
    assert "mermaid" in code and len(code) > 1_000_000
    assert len(page) < 4_000_000
    assert "a[&quot;&lt;b&gt;x&lt;/b&gt;&quot;] --&gt; b" in page  # readable even where scripts are off
    assert "securityLevel" in page


def test_the_licence_of_mermaid_lies_beside_it():
    import importlib.resources

    assets = importlib.resources.files("tfvllm").joinpath("assets")
    assert "MIT License" in assets.joinpath("mermaid-LICENSE.txt").read_text()
    assert len(assets.joinpath(html.MERMAID).read_bytes()) < 4_000_000


def test_plots_follow_light_and_dark():
    svg = html.plot(draw, caption="Loss by epoch")
    assert "currentColor" in svg and "var(--s1)" in svg
    colours = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", svg))
    assert not colours  # a fixed colour would vanish in one of the two
    assert "<style" not in svg and "<metadata" not in svg
    assert 'role="img" aria-label="Loss by epoch"' in svg
    assert "a &lt; b &amp; c" in svg


def test_plots_of_one_page_do_not_share_ids_and_are_the_same_each_time():
    first, second = html.plot(draw, caption="one"), html.plot(draw, caption="two")
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip((first, second), ids):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= own
    assert first == html.plot(draw, caption="one")


def test_tables_escape_and_align():
    table = html.table(["name", "ms"], [["<a>", "1.5"], ["b", "–"]])
    assert "<td>&lt;a&gt;</td>" in table and '<td class="number">1.5</td>' in table
    assert '<th class="number">ms</th>' in table and "<th>name</th>" in table
    assert "<td>" in html.table(["x"], [["2 of 3 words"], ["none"]])


def test_pages_in_a_browser(tmp_path):
    wide = "flowchart TD\n" + "".join(f'  a --> b{i}["<b>layer {i}</b><br/>MatMul, BiasAdd"]\n' for i in range(30))
    long = "x" * 60 + " and a sentence that has to wrap somewhere on a phone" * 3
    body = [
        html.cards([("1.0×", "faster"), ("61.25%", "accuracy")] * 3),
        html.table(["rule", "times", "guarantee", "what it does"], [["FuseGelu", "3", long, long]]),
        html.plot(draw, caption="A plot"),
        html.diagram("flowchart TD\n  a --> b", "A small graph"),
        html.diagram(wide, "A wide graph", folded=True),
    ]
    page = tmp_path / "page.html"
    page.write_text(html.page("A page", "\n".join(body)), encoding="utf-8")
    faulty = tmp_path / "faulty.html"
    faulty.write_text(html.page("t", "<div style='width: 1500px'>wide</div>"), encoding="utf-8")
    with browser.chromium() as chromium:
        browser.check_page(chromium, page, diagrams=2)
        with pytest.raises(AssertionError, match="too wide"):
            browser.check_page(chromium, faulty, diagrams=0)


@pytest.mark.thorough
def test_the_simplifier_report_in_a_browser(tmp_path):
    tfvllm.simplify(bert_classifier(layers=2).backbone).report.to_html(tmp_path / "simplify.html")
    with browser.chromium() as chromium:
        browser.check_page(chromium, tmp_path / "simplify.html", diagrams=2)
