import os
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
TEST_DATA = Path(os.environ.get("FVAE_TEST_DATA", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def test_data():
    "The folder with bigger test data; tests that need it skip without it"
    if not TEST_DATA.is_dir(): pytest.skip(f"no test data at {TEST_DATA} (set FVAE_TEST_DATA)")
    return TEST_DATA


@pytest.fixture(scope="session")
def taef2(test_data):
    "TAEF2 with its released weights"
    folder = test_data / "weights" / "taef2"
    if not folder.is_dir(): pytest.skip(f"no TAEF2 weights at {folder}")
    from fvae_nb.vaes.interface import load_vae
    return load_vae("taef2", weights=folder)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    "An empty working folder without settings of its own"
    monkeypatch.chdir(tmp_path)
    return tmp_path
