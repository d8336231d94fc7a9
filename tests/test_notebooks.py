"Every chapter runs from top to bottom."
import os, time
from pathlib import Path
import pytest
from conftest import ROOT
from fvae_nb.running.book import chapters
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False


@pytest.mark.parametrize("path", chapters(ROOT), ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_chapter(path, monkeypatch):
    monkeypatch.chdir(path.parent); monkeypatch.setenv("IN_TEST", "1")
    start = time.time()
    passed, _ = run_notebook(path, skip_flags=["slow", "gpu"], basepath=ROOT)
    assert passed
    print(f"{time.time() - start:.1f} s")
