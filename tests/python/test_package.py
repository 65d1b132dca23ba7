"""The package as it is installed: its files, what its module exports, and what importing it needs."""

import importlib.metadata
import pathlib
import shutil
import subprocess

import pytest

import pbsattn
from conftest import python


def test_the_wheel_is_the_runtime_alone():
    """Evaluation is pbsattn_eval's. What is beside is the extension module and Highway."""
    installed = {
        str(path) for path in importlib.metadata.files("pbsattn") if ".dist-info/" not in str(path) and path.suffix != ".pyc"
    }
    source = pathlib.Path(__file__).parents[2] / "integrations/python/pbsattn"
    files = {path.relative_to(source.parent) for path in source.rglob("*") if path.suffix in (".py", ".pyi")}
    expected = {*map(str, files), "pbsattn/py.typed"}
    assert {path for path in installed if ".so" not in path} == expected
    assert not [path for path in installed if "eval" in path or "report" in path]
    assert "pbsattn/_core.abi3.so" in installed or any(
        path.startswith("pbsattn/_core.") and path.endswith(".so") for path in installed
    )


def test_no_extra_names_a_distribution_of_ours():
    required = importlib.metadata.requires("pbsattn")
    assert required and not [each for each in required if each.startswith("pbsattn")]


def test_the_module_exports_its_init_function_alone():
    """Else other libraries of the process take from it what it links statically, as operator delete of libstdc++."""
    nm = shutil.which("nm") or pytest.fail("nm isn't there; install binutils, which the compiler needs anyway")
    listed = subprocess.run(
        [nm, "-D", "--defined-only", "--format=posix", pbsattn._core.__file__], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["PyInit__core"]


USE = """
q = torch.randn(1, 2, 300, 64)
assert pbsattn.attention(q, q, q).shape == q.shape
try:
    pbsattn.attention(q, q, q, method="pbz")
except ValueError as error:
    assert "pbz" in str(error)
print("used")
"""
MODULE_FIRST = f"""
import sys, types
stub = types.ModuleType("pbsattn")
stub.__path__ = [{str(pathlib.Path(pbsattn.__file__).parent)!r}]
sys.modules["pbsattn"] = stub
import pbsattn._core
assert "torch" not in sys.modules
del sys.modules["pbsattn"]
import torch, pbsattn
"""


@pytest.mark.parametrize(
    "imports",
    ["import pbsattn, torch", "import torch, pbsattn", MODULE_FIRST],
    ids=["package-first", "torch-first", "module-first"],
)
def test_import_order(imports):
    ran = python("-c", imports + USE)
    assert (ran.returncode, ran.stdout) == (0, "used\n"), ran.stderr


def test_the_package_imports_torch_first():
    ran = python("-X", "importtime", "-c", "import pbsattn")
    loaded = [line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()]
    assert loaded.index("torch") < loaded.index("pbsattn._core")


def test_importing_without_torch(tmp_path):
    ran = python("-c", "import pbsattn", without="torch", folder=tmp_path)
    assert ran.stderr.splitlines()[-1] == "ImportError: pbsattn: needs torch, which is not installed; pip install torch"
