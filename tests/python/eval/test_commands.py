"""How the commands of both packages end: without what they need, on pipes that close, full disks, and signals."""

import json
import os
import pathlib
import re
import signal

import pytest

import pbsattn
from conftest import python

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn_eval
from test_report import ppl_run

CLOSED_PIPE = 128 + signal.SIGPIPE
SOURCE = pathlib.Path(pbsattn_eval.__file__).parent


def test_it_uses_public_names_alone():
    private = re.compile(r"pbsattn(\.\w+)*\._(?!_)|from pbsattn(\.\w+)* import .*\b_|\b(plan|trace|stats)\._(?!_)")
    assert private.search("from pbsattn import a, _b") and private.search("pbsattn._core") and private.search("pbsattn.x._y")
    found = [
        f"{path}: {line}" for path in SOURCE.rglob("*.py") for line in path.read_text().splitlines() if private.search(line)
    ]
    assert found == []


def test_versions_go_together(tmp_path):
    assert pbsattn_eval.__version__ == pbsattn.__version__
    (tmp_path / "sitecustomize.py").write_text("import pbsattn; pbsattn.__version__ = '9.9'\n")
    ran = python(
        "-m", "pbsattn_eval", env={"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    )
    assert ran.returncode == 1 and "goes with pbsattn of the same version, and 9.9 is installed; pip install" in ran.stderr


def test_alone_it_lists_its_commands():
    ran = python("-m", "pbsattn_eval")
    assert ran.returncode == 0
    for command in ("ppl", "recall", "needle", "ruler", "tasks", "budgets", "learn", "table", "page", "report", "bench"):
        assert f"\n    {command} " in ran.stdout
    for command in ("ppl", "report", "bench"):
        told = python("-m", "pbsattn_eval", command, "--help")
        assert told.returncode == 0 and told.stdout.startswith(f"usage: python -m pbsattn_eval {command}")


@pytest.mark.parametrize(
    "old, new",
    [
        (["pbsattn", "eval", "ppl", "--model", "m"], "python -m pbsattn_eval now"),
        (["pbsattn", "report", "run"], "python -m pbsattn_eval report now"),
        (["pbsattn", "bench", "op"], "python -m pbsattn_eval bench now"),
        (["pbsattn.bench", "op"], "python -m pbsattn_eval bench now"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_old_commands_name_the_new_ones(old, new):
    ran = python("-m", *old)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert (
        new in ran.stderr and "pip install ./integrations/python/pbsattn_eval" in ran.stderr and ran.stderr.count("\n") == 1
    )


# ------------------------------------------------------------------------------------- what is missing


def _write_gguf(path):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "module, command",
    [
        ("torch", ["pbsattn"]),
        ("torch", ["pbsattn_eval", "--help"]),
        ("torch", ["pbsattn_eval", "bench", "--help"]),
        ("transformers", ["pbsattn_eval", "bench", "--help"]),
        ("transformers", ["pbsattn_eval", "ppl", "--model", "{}/run", "--text", "{}/run/run.json"]),
        ("numpy", ["pbsattn_eval", "table", "{}/run"]),
        ("jinja2", ["pbsattn_eval", "report", "{}/run"]),
        ("matplotlib", ["pbsattn_eval", "page", "{}/run", "--to", "{}/page"]),
        ("matplotlib", ["pbsattn_eval", "bench", "plot", "{}/made.json", "--to", "{}/plot"]),
        ("gguf", ["pbsattn_eval", "bench", "prefill", "--model", "{}/small.gguf", "--device", "cpu"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]),
)
def test_what_is_missing_is_told_in_a_line(tmp_path, module, command):
    ppl_run(tmp_path / "run")
    if module == "gguf":
        _write_gguf(tmp_path / "small.gguf")
    (tmp_path / "made.json").write_text(
        json.dumps(
            [
                {
                    "case": "sdpa",
                    "metric": "time to first token",
                    "value": 1.0,
                    "device": "d",
                    "params": {"n": 600, "model": "m"},
                }
            ]
        )
    )
    ran = python("-m", *(word.format(tmp_path) for word in command), without=module, folder=tmp_path)
    said = [line for line in ran.stderr.splitlines() if "Warning" not in line and not line.startswith(("  ", "loading"))]
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert module in said[-1] and "install" in said[-1], ran.stderr
    assert len(said) == 1 or module in ("gguf", "numpy"), said  # about which the libraries have something to say, too


# --------------------------------------------------------------------------------- how the commands end


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ppl_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize(
    "command, unbuffered",
    [
        (["pbsattn"], "1"),
        (["pbsattn_eval", "--help"], ""),
        (["pbsattn_eval", "table", "{}"], ""),
        (["pbsattn_eval", "bench", "--help"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_reader_that_has_enough_is_no_fault(run, command, unbuffered):
    read, write = os.pipe()
    os.close(read)
    ran = python("-m", *(word.format(run) for word in command), stdout=write, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(write)
    assert (ran.returncode, ran.stderr) == (CLOSED_PIPE, "")


@pytest.mark.parametrize("command", [["pbsattn"], ["pbsattn_eval", "table", "{}"]], ids=" ".join)
def test_full_standard_output(run, command):
    with open("/dev/full", "w") as full:
        ran = python("-m", *(word.format(run) for word in command), stdout=full, env={"PYTHONUNBUFFERED": ""})
    assert ran.returncode == 1 and len(ran.stderr.splitlines()) == 1 and "standard output: No space left" in ran.stderr


def test_json_is_written_through_a_link(run, tmp_path):
    from pbsattn_eval import commands
    from pbsattn_eval.bench import records

    (tmp_path / "disk").mkdir()
    for name in ("table.json", "bench.json"):
        (tmp_path / name).symlink_to(f"disk/{name}")
    (tmp_path / "disk/table.json").write_text("what stood there")
    assert commands.main(["table", str(run), "--json", str(tmp_path / "table.json")]) == 0
    records.write_json(tmp_path / "bench.json", [])
    for name in ("table.json", "bench.json"):
        assert (tmp_path / name).is_symlink()
        json.loads((tmp_path / "disk" / name).read_text())
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["bench.json", "table.json"]
    assert commands.main(["table", str(run), "--json", os.devnull]) == 0
    assert pathlib.Path(os.devnull).is_char_device()


def test_files_are_written_before_a_reader_can_leave(run, tmp_path):
    read, write = os.pipe()
    os.close(read)
    ran = python("-m", "pbsattn_eval", "table", run, "--json", tmp_path / "rows.json", stdout=write)
    os.close(write)
    assert ran.returncode == CLOSED_PIPE and json.loads((tmp_path / "rows.json").read_text())


TERMINATED = """
import faulthandler, os, runpy, signal, sys

faulthandler.dump_traceback_later(240, exit=True)  # a process that doesn't end says where it stands

from pbsattn_eval.kinds import ppl

measure = ppl.Kind.measure

def ended(self, engine, item, attention, state):
    if attention.name == "pbs:top_p=1.0":
        os.kill(os.getpid(), signal.SIGTERM)
    return measure(self, engine, item, attention, state)

ppl.Kind.measure = ended
runpy.run_module("pbsattn_eval", run_name="__main__", alter_sys=True)
"""


def test_sigterm_keeps_what_is_done(folder, tmp_path):
    from test_eval import items_of, ppl_arguments

    ran = python("-c", TERMINATED, *ppl_arguments(folder, tmp_path / "run"))
    assert ran.returncode == 128 + signal.SIGTERM, ran.stderr
    assert "interrupted; 2 record(s) are kept" in ran.stderr and "Traceback" not in ran.stderr
    assert len(items_of(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").glob("*partial*"))
