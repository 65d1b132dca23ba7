"""The package as it is installed: what its module exports, what importing it needs, and how its commands end."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import pbsattn

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from test_report import ppl_run  # noqa: E402

CLOSED_PIPE = 128 + signal.SIGPIPE


def python(*arguments, without=None, folder=None, **options):
    """Runs Python in a process of its own, where the module `without` can't be imported."""
    environment = dict(os.environ)
    if without:
        (folder / "sitecustomize.py").write_text(f"import sys; sys.modules[{without!r}] = None\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, **options}
    return subprocess.run([sys.executable, *map(str, arguments)], text=True, env={**environment, **options.pop("env", {})}, **options)


def test_the_module_exports_its_init_function_alone():
    """Else other libraries of the process take from it what it links statically, as operator delete of libstdc++."""
    nm = shutil.which("nm") or pytest.fail("nm isn't there; install binutils, which the compiler needs anyway")
    listed = subprocess.run([nm, "-D", "--defined-only", "--format=posix", pbsattn._core.__file__], capture_output=True, text=True,
                            check=True)
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


@pytest.mark.parametrize("imports", ["import pbsattn, torch", "import torch, pbsattn", MODULE_FIRST],
                         ids=["package-first", "torch-first", "module-first"])
def test_import_order(imports):
    ran = python("-c", imports + USE)
    assert (ran.returncode, ran.stdout) == (0, "used\n"), ran.stderr


def test_the_package_imports_torch_first():
    ran = python("-X", "importtime", "-c", "import pbsattn")
    loaded = [line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()]
    assert loaded.index("torch") < loaded.index("pbsattn._core")


# ------------------------------------------------------------------------------------- what is missing


def test_importing_without_torch(tmp_path):
    ran = python("-c", "import pbsattn", without="torch", folder=tmp_path)
    assert ran.stderr.splitlines()[-1] == "ImportError: pbsattn: needs torch, which is not installed; pip install torch"


def _write_gguf(path):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("module, command", [
    ("torch", ["pbsattn"]),
    ("torch", ["pbsattn", "eval", "--help"]),
    ("torch", ["pbsattn.bench", "--help"]),
    ("transformers", ["pbsattn.bench", "--help"]),
    ("transformers", ["pbsattn", "eval", "ppl", "--model", "{}/run", "--text", "{}/run/run.json"]),
    ("numpy", ["pbsattn", "eval", "table", "{}/run"]),
    ("jinja2", ["pbsattn", "report", "{}/run"]),
    ("matplotlib", ["pbsattn", "eval", "page", "{}/run", "--to", "{}/page"]),
    ("matplotlib", ["pbsattn.bench", "plot", "{}/made.json", "--to", "{}/plot"]),
    ("gguf", ["pbsattn.bench", "prefill", "--model", "{}/small.gguf", "--device", "cpu"]),
], ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]))
def test_what_is_missing_is_told_in_a_line(tmp_path, module, command):
    ppl_run(tmp_path / "run")
    if module == "gguf":
        _write_gguf(tmp_path / "small.gguf")
    (tmp_path / "made.json").write_text(json.dumps([{"case": "sdpa", "metric": "time to first token", "value": 1.0, "device": "d",
                                                     "params": {"n": 600, "model": "m"}}]))
    ran = python("-m", *(word.format(tmp_path) for word in command), without=module, folder=tmp_path)
    said = [line for line in ran.stderr.splitlines() if "Warning" not in line and not line.startswith(("  ", "loading"))]
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert module in said[-1] and "install" in said[-1], ran.stderr
    assert len(said) == 1 or module in ("gguf", "numpy"), said  # about which the libraries have something to say, too


# --------------------------------------------------------------------------------- how the commands end


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ppl_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("command, unbuffered", [
    (["pbsattn"], "1"), (["pbsattn", "eval", "--help"], ""), (["pbsattn", "eval", "table", "{}"], ""), (["pbsattn.bench", "--help"], ""),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_a_reader_that_has_enough_is_no_fault(run, command, unbuffered):
    read, write = os.pipe()
    os.close(read)
    ran = python("-m", *(word.format(run) for word in command), stdout=write, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(write)
    assert (ran.returncode, ran.stderr) == (CLOSED_PIPE, "")


@pytest.mark.parametrize("command", [["pbsattn"], ["pbsattn", "eval", "table", "{}"]], ids=" ".join)
def test_full_standard_output(run, command):
    with open("/dev/full", "w") as full:
        ran = python("-m", *(word.format(run) for word in command), stdout=full, env={"PYTHONUNBUFFERED": ""})
    assert ran.returncode == 1 and len(ran.stderr.splitlines()) == 1 and "standard output: No space left" in ran.stderr


def test_json_is_written_through_a_link(run, tmp_path):
    from pbsattn.bench import report
    from pbsattn.eval import program

    (tmp_path / "disk").mkdir()
    for name in ("table.json", "bench.json"):
        (tmp_path / name).symlink_to(f"disk/{name}")
    (tmp_path / "disk/table.json").write_text("what stood there")
    assert program.main(["table", str(run), "--json", str(tmp_path / "table.json")]) == 0
    report.write_json(tmp_path / "bench.json", [])
    for name in ("table.json", "bench.json"):
        assert (tmp_path / name).is_symlink()
        json.loads((tmp_path / "disk" / name).read_text())
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["bench.json", "table.json"]
    assert program.main(["table", str(run), "--json", os.devnull]) == 0
    assert pathlib.Path(os.devnull).is_char_device()


def test_files_are_written_before_a_reader_can_leave(run, tmp_path):
    read, write = os.pipe()
    os.close(read)
    ran = python("-m", "pbsattn", "eval", "table", run, "--json", tmp_path / "rows.json", stdout=write)
    os.close(write)
    assert ran.returncode == CLOSED_PIPE and json.loads((tmp_path / "rows.json").read_text())


TERMINATED = """
import faulthandler, os, runpy, signal, sys

faulthandler.dump_traceback_later(240, exit=True)  # a process that doesn't end says where it stands

import pbsattn.eval.ppl as ppl

measure = ppl.Kind.measure

def ended(self, engine, item, attention, state):
    if attention.name == "pbs:top_p=1.0":
        os.kill(os.getpid(), signal.SIGTERM)
    return measure(self, engine, item, attention, state)

ppl.Kind.measure = ended
sys.argv[1:1] = ["eval"]
runpy.run_module("pbsattn", run_name="__main__", alter_sys=True)
"""


def test_sigterm_keeps_what_is_done(folder, tmp_path):
    from test_eval import items_of, ppl_arguments

    ran = python("-c", TERMINATED, *ppl_arguments(folder, tmp_path / "run"))
    assert ran.returncode == 128 + signal.SIGTERM, ran.stderr
    assert "interrupted; 2 record(s) are kept" in ran.stderr and "Traceback" not in ran.stderr
    assert len(items_of(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").glob("*partial*"))
