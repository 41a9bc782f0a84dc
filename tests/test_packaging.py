"""The layout that keeps a neighbour alive: Hugging Face publishes a package named `kernels`.

transformers imports it, and its Llama 4 goes through that import. Our folders must never answer to
bare `kernels`, `llama4` or `eagle3`; the missing `__init__.py` files are the protection.
"""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "llama4", "eagle3")


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "bench"])
def test_no_init_files(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_resolve_to_the_top_level(folder):
    link = ROOT / "src" / "aerie" / folder
    assert link.is_symlink(), f"{link}: not a link; git config core.symlinks true, then check out"
    assert link.resolve() == ROOT / folder


def test_transformers_llama4_imports_from_the_root():
    """From a process that starts in the repository root, where our folders are on the path."""
    code = "import transformers.models.llama4.modeling_llama4, sys; print('kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_our_kernels_do_not_answer_to_the_bare_name():
    """A namespace folder has no loader file, so any installed package of that name wins."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert str(ROOT) not in result.stdout


def test_wheel_holds_only_aerie(tmp_path):
    """Everything under `aerie/`, with the type marker and the embedded checkpoint."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building without isolation needs setuptools in this environment")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    scratch = ["-w", str(tmp_path), str(ROOT)]
    subprocess.run([*command, *scratch], check=True, capture_output=True, env=os.environ)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"aerie"}
    wanted = ["py.typed", "kernels/rms_norm.py", "llama4/model.py", "eagle3/generate.py"]
    wanted += ["assets/target/model.safetensors", "assets/draft/model.safetensors"]
    assert [name for name in wanted if f"aerie/{name}" not in names] == []
