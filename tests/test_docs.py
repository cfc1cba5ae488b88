"""What the documents and notebooks say about the repository: links lead somewhere, outputs are clean."""

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("saved_models/**/*.md"), *ROOT.glob("examples/**/*.md")]
)
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


@cache
def cells(notebook: Path) -> tuple[dict, ...]:
    return tuple(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


def prose(file: Path) -> str:
    """The Markdown of a page or of a notebook's text cells, without its code."""
    if file.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in cells(file) if cell["cell_type"] == "markdown")
    else:
        text = file.read_text(encoding="utf-8")
    return re.sub(r"`[^`\n]*\n?[^`\n]*`", lambda code: code[0].replace("](", "] ("), FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings, and those written as HTML."""
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} +(.*?)\s*#*$", text, re.MULTILINE):
        shown = LINK.sub("]", heading).replace("[", "").replace("]", "").lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        number = next(n for n in range(1000) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken(file: Path) -> list[str]:
    """The links of a file that lead nowhere in this repository; addresses of other sites are not asked for."""
    wrong = []
    for link in LINK.findall(prose(file)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or ROOT not in (target, *target.parents):
            wrong.append(f"{link}: no such file")
        elif anchor and target.suffix in (".md", ".ipynb") and anchor not in anchors(prose(target)):
            wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("file", [*PAGES, *NOTEBOOKS], ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    assert broken(file) == []


def test_a_wrong_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n[x](gone.md) [y](#a-b-c) [z](page.md#d) [site](https://example.org/x)\n")
    assert broken(page) == ["gone.md: no such file", "page.md#d: no such heading"]


def test_both_readmes_show_the_same_code():
    english, chinese = (
        FENCE.findall((ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "README.zh.md")
    )
    assert english == chinese, "copy the code blocks of README.md to README.zh.md: only README.md's are run"


def test_python_blocks_name_only_what_they_import(tmp_path):
    """Every block is run in a process of its own: it has the imports of no other. Found here in a second."""
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = page.read_text(encoding="utf-8")
        for block in FENCE.finditer(text):
            if block[1] == "python":
                line = text[: block.start()].count("\n") + 1
                (tmp_path / f"{page.name}:{line}.py").write_text(block[2], encoding="utf-8")
    check = ["ruff", "check", "--isolated", "--no-cache", "--select=F821", "--output-format=concise", "."]
    found = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_page_and_notebook_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    names = [page.name for page in ROOT.glob("docs/*.md") if page.name != "index.md"]
    assert [name for name in (*names, *(n.name for n in NOTEBOOKS)) if f"{name})" not in index] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.name)
def test_notebooks_are_ready_to_be_opened(notebook):
    title, install = cells(notebook)[:2]
    assert f"github/tfvllm/tfvllm/blob/main/notebooks/{notebook.name}" in "".join(title["source"])  # the Colab badge
    assert "%pip install" in "".join(install["source"])
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "not run from top to bottom"
    assert any("SMALL = True" in "".join(cell["source"]) for cell in code)
    shown = json.dumps([cell["outputs"] for cell in code])
    assert '"output_type": "error"' not in shown and '"name": "stderr"' not in shown
    assert re.search(r"/(tmp|work|home|root|usr)/|INFO:tensorflow", shown) is None, "speaks of the machine it ran on"
    assert notebook.stat().st_size < 150_000


def test_recipes_of_the_readme_are_recipes(tmp_path, monkeypatch):
    from tfvllm.compress.recipe import read_recipe

    monkeypatch.chdir(tmp_path)
    for folder in ("reviews", "pairs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "stories.jsonl").touch()
    tasks = []
    for language, block in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        if language == "yaml":
            (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
            tasks.append(read_recipe("recipe.yaml").task)
            assert len(block.splitlines()) <= 10
    assert tasks == ["classify", "generate", "translate"]
