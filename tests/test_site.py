"The book as a static site: what is staged, what Sphinx makes of it, every link."
import ast, importlib.util, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT
from fvae_nb.running.site import api_page, build, chapter_facts, check_site, documented, fetch_mathjax, page_notebook, paper_items, stage


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    source = tmp_path_factory.mktemp("site") / "source"; source.mkdir()
    return source, stage(ROOT, source)


def cells(path): return json.loads(path.read_text())["cells"]


def test_every_chapter_and_job_has_a_page_and_a_place_in_the_contents(staged):
    source, chapters = staged
    wanted = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "runs"} & set(p.parts)} - {"index.ipynb"}
    assert set(chapters) == wanted
    contents = "".join(cells(source / "index.ipynb")[-1]["source"])
    listed = re.findall(r"^([\w/.+-]+)$", contents, re.M)
    assert wanted <= set(listed) and len(listed) == len(set(listed))
    for name in wanted: assert (source / name).is_file() and f"]({name})" in (source / "map.md").read_text()


def test_pages_carry_no_setup_and_no_directives(staged):
    source, chapters = staged
    for name in chapters:
        for cell in cells(source / name):
            if cell["cell_type"] == "code": assert not re.search(r"^#\||^from fastcore.test", "".join(cell["source"]), re.M), name


def test_every_public_name_has_an_entry_with_its_chapter(staged):
    source, _ = staged
    spec = importlib.util.spec_from_file_location("modidx", ROOT / "fvae_nb/_modidx.py"); idx = importlib.util.module_from_spec(spec); spec.loader.exec_module(idx)
    missing = []
    for module, names in idx.d["syms"].items():
        page = source / f"api/{module}.md"
        text = page.read_text()
        public = next((ast.literal_eval(n.value) for n in ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text()).body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
        missing += [n for n in public if f"\n## {n}\n" not in text]
        assert not names or "Chapter: [" in text, module
    assert missing == []


def test_arguments_bring_their_comments():
    _, names = documented(ROOT / "fvae_nb/data/ct.py")
    one = {d.name: d for d in names}["read_ct"]
    assert one.cell == "01_data/01_ct.ipynb" and one.doc and all(r[3] for r in one.rows), one.rows
    assert one.returns[0] == "CTVolume"


def test_a_pipe_in_a_type_does_not_break_the_table(tmp_path):
    (tmp_path / "m.py").write_text('__all__ = ["f"]\ndef f(\n    a:int|None=None, # one | two\n) -> str|None: # <b>\n    "Do"\n')
    row = next(line for line in api_page("m", tmp_path / "m.py").splitlines() if line.startswith("| `a`"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 5 and "&lt;b" in api_page("m", tmp_path / "m.py")


def test_the_map_knows_the_theorem_and_the_tables():
    facts = chapter_facts(ROOT / "nbs/06_augmentation/04_theory.ipynb")
    assert "Theorem 1" in facts[3] and facts[1].endswith("?") and facts[2] == "augmentation.theory"
    assert paper_items("`specs/x.md` section 3 and design.md, Table 2") == []
    assert paper_items("Sections 3.1 and eq. (5)") == ["Section 3.1", "Equation 5"]


def test_the_map_tells_what_a_chapter_costs():
    from fvae_nb.running.site import map_page
    page = map_page({"a.ipynb": ("A", "why?", "", ["Table 1"]), "b.ipynb": ("B", "how?", "", [])}, {"a.ipynb": {"cpu_s": 12, "peak_mb": 1536}})
    assert "| [A](a.ipynb) | why? | 12\u00a0s, 1.5\u00a0GB | Table 1 |" in page and "| [B](b.ipynb) | how? |  |  |" in page
    import json
    costs = json.loads((ROOT / "nbs/costs.json").read_text())
    assert all(c["cpu_s"] < 300 and 50 < c["peak_mb"] < 8192 for c in costs.values())
    assert costs.keys() == json.loads((ROOT / "nbs/outputs.json").read_text()).keys()          # each execution writes both


def test_links_out_of_the_site_become_words(staged, tmp_path):
    source, chapters = staged
    for name in [*chapters, "index.ipynb"]:
        for cell in cells(source / name):
            if cell["cell_type"] != "markdown": continue
            for url in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", "".join(cell["source"])):
                if re.match(r"[a-z]+:|#", url) or "/api/" in url or url.startswith("api/"): continue
                assert ((source / name).parent / url.split("#")[0]).resolve().is_file(), (name, url)


def test_faults_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#x">ok</a><a href="b.html#y">no such place</a><a href="gone.html">gone</a><a href="https://example.org">outside</a><img src="p.png"><script src="https://example.org/x.js"></script>')
    (tmp_path / "b.html").write_text('<h1 id="x">b</h1>')
    assert check_site(tmp_path) == ["a.html: b.html#y: no such place there", "a.html: gone.html leads nowhere", "a.html: needs https://example.org/x.js", "a.html: p.png leads nowhere"]


def test_without_npm_there_is_no_mathjax_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_mathjax(tmp_path / "kept") is None
    (tmp_path / "kept").mkdir(); (tmp_path / "kept/tex-svg.js").write_text("x")
    assert fetch_mathjax(tmp_path / "kept") == tmp_path / "kept/tex-svg.js"


def docs_python():
    "An interpreter with Sphinx and myst-nb, None without"
    for python in filter(None, (os.environ.get("FVAE_DOCS_PYTHON"), ROOT / "build/docs/bin/python", sys.executable)):
        if Path(python).exists() and subprocess.run([python, "-c", "import sphinx, myst_nb, sphinx_book_theme"], capture_output=True).returncode == 0: return str(python)


@pytest.mark.slow
@pytest.mark.browser
def test_the_site_is_whole_and_works_without_a_network(tmp_path):
    from browser import open_page
    python = docs_python()
    if python is None: pytest.skip("Sphinx is not installed: `make docs` does it, in build/docs (or set FVAE_DOCS_PYTHON)")
    index, said = build(ROOT, tmp_path / "site", python, mathjax=False)
    assert said == [] and check_site(index.parent) == []
    with open_page(index.as_uri(), tmp_path) as page:
        assert len(page.find("nav a, .bd-sidebar a")) > 40
        page.driver.get((index.parent / "search.html").as_uri() + "?q=nodule")
        page.wait(lambda: len(page.find("#search-results li")) > 2, what="for the search")
        page.driver.get((index.parent / "02_show/02_page.html").as_uri())
        page.driver.switch_to.frame(page.find("iframe.fvae-viewer")[0])
        page.wait(lambda: page.script("return document.body.dataset.ready"), what="for the viewer")
        assert page.requests() == [] and page.errors() == []


def test_nothing_but_a_site_is_ever_wiped(tmp_path):
    from fvae_nb.running.site import build
    (tmp_path / "nbs").mkdir(); (tmp_path / "nbs/index.ipynb").write_text("{}"); (tmp_path / "mine").mkdir(); (tmp_path / "mine/thesis.txt").write_text("x")
    for out in (tmp_path, tmp_path.parent, tmp_path / "mine"):
        with pytest.raises(FileExistsError, match="other things than a site"): build(tmp_path, out)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x" and (tmp_path / "nbs/index.ipynb").exists()
