"Notebooks, library, README and configuration say the same thing."
import ast, configparser, json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path
import pytest
from conftest import ROOT


def test_export_in_sync(tmp_path):
    for name in ("nbs", "pyproject.toml", "settings.ini"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "fvae_nb").mkdir(); shutil.copy(ROOT / "fvae_nb/__init__.py", tmp_path / "fvae_nb")
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, check=True, env={k: v for k, v in os.environ.items() if k != "IN_TEST"})
    files = lambda base: {p.relative_to(base).as_posix(): p.read_text() for p in (base / "fvae_nb").rglob("*.py")}
    fresh, committed = files(tmp_path), files(ROOT)
    assert sorted(fresh) == sorted(committed)
    assert [n for n in fresh if fresh[n] != committed[n]] == []


def test_outputs_readme_and_packaged_notebooks_in_step():
    from fvae_nb.running.book import out_of_step
    assert out_of_step(ROOT) == []


FLOORS = [["settings"], ["data"], ["metrics", "vaes"], ["show"], ["reconstruction"], ["augmentation", "generation"], ["evaluation"]]
ABOVE = {"jobs", "running.report", "running.cli", "running.book"}


def _floor(module):
    head = module.split(".")[0]
    return next((n for n, names in enumerate(FLOORS) if head in names), None)


def test_lower_floors_never_import_higher_ones():
    wrong = []
    for path in (ROOT / "fvae_nb").rglob("*.py"):
        if path.name in ("__init__.py", "_modidx.py"): continue
        me = ".".join(path.relative_to(ROOT / "fvae_nb").with_suffix("").parts)
        package = me.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[:len(package) - node.level + 1]
                names = [".".join(base + ([node.module] if node.module else []))]
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fvae_nb"): names = [node.module[8:]]
            elif isinstance(node, ast.Import): names = [a.name[8:] for a in node.names if a.name.startswith("fvae_nb.")]
            for name in filter(None, names):
                top = me.startswith("jobs.") or me in ABOVE
                mine, theirs = _floor(me), _floor(name)
                if top: continue
                if name.startswith("jobs") or name in ABOVE:
                    if not (me == "running.jobs" and name in ("running.report", "jobs")): wrong.append(f"{me} imports {name}")
                elif me.startswith("running."):
                    if theirs not in (None, 0): wrong.append(f"{me} (knows no science) imports {name}")
                elif theirs is None or theirs > mine: wrong.append(f"{me} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("what", ["import fvae_nb", "import fvae_nb.data.ct", "import fvae_nb.running.cases", "import fvae_nb.running.jobs", "from fvae_nb.running.cli import main; main(['--help'])",
                                  "from fvae_nb.jobs import reconstruct", "import fvae_nb.show.slices", "import fvae_nb.metrics.image"])
def test_imports_stay_light(what):
    code = f"import time; t = time.process_time()\n{what}\nimport sys; print(time.process_time() - t, *[m for m in ('torch', 'diffusers', 'monai', 'transformers', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1].split()
    assert out[1:] == [], f"{what} loads {out[1:]}"
    assert float(out[0]) < 1.5


def test_settings_agree_with_pyproject():
    import fvae_nb
    ini = configparser.ConfigParser(); ini.read(ROOT / "settings.ini")
    facts, project = ini["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text())
    p, nb = project["project"], project["tool"]["nbdev"]
    assert facts["lib_name"] == p["name"] and facts["version"] == fvae_nb.__version__ and facts["description"] == p["description"]
    assert p["requires-python"] == f">={facts['min_python']}" and facts["license"] == p["license"] and facts["keywords"].split() == p["keywords"]
    assert (facts["lib_path"], facts["nbs_path"], facts["readme_nb"], facts["tst_flags"]) == (nb["lib_path"], nb["nbs_path"], nb["readme_nb"], nb["tst_flags"])
    name, target = facts["console_scripts"].split("=")
    assert p["scripts"] == {name: target}


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {re.split(r"==", line)[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {re.split(r"[\[<>=!~; ]", d)[0].lower().replace("_", "-") for d in project["dependencies"] + project["optional-dependencies"]["dev"]}
    assert wanted - pinned == set()


def test_public_functions_document_themselves():
    bare = []
    for path in (ROOT / "fvae_nb").rglob("*.py"):
        tree = ast.parse(path.read_text())
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
        bare += [f"{path.name}:{n.name}" for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public and not ast.get_docstring(n)]
    assert bare == []


def test_committed_notebooks_are_light_and_clean():
    said = []
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts or "runs" in path.parts: continue
        book = json.loads(path.read_text())
        if path.stat().st_size > 1.5e6: said.append(f"{path.name}: {path.stat().st_size/1e6:.1f} MB")
        if "widgets" in book["metadata"]: said.append(f"{path.name}: widget state")
        for cell in book["cells"]:
            for out in cell.get("outputs", []):
                if out["output_type"] == "error": said.append(f"{path.name}: {out['ename']}")
                picture = out.get("data", {}).get("image/png", "")
                if len(picture) * 3 / 4 > 220_000: said.append(f"{path.name}: a picture of {len(picture) * .75 / 1000:.0f} KB")
    assert said == []


def test_cells_are_short():
    "A cell is read at a glance: at most 70 lines"
    long = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if {"runs", ".ipynb_checkpoints"} & set(path.parts): continue
        for n, cell in enumerate(json.loads(path.read_text())["cells"]):
            if cell["cell_type"] == "code" and (lines := len("".join(cell["source"]).splitlines())) > 70: long.append(f"{path.name} cell {n}: {lines} lines")
    assert long == []
