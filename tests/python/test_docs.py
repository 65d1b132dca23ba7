"""Runs the Python of the user pages: programs in their blocks, and commands that start Python, on a tiny model."""

import pathlib
import runpy
import shlex
import sys

import pytest
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

import pbsattn.transformers
from conftest import TEXT, save_llama
from learned_files import save_learned
from pages import PYTHON, ROOT, USER_PAGES, blocks, commands

LESS = {"--lengths": "1024", "--tokens": "1024", "--samples": "1", "--depths": "2"}  # than the pages' commands ask for


@pytest.fixture(scope="module")
def work(folder, tmp_path_factory):
    """A folder that has what the pages' commands name. Its model has the heads and layers that they name."""
    work = tmp_path_factory.mktemp("docs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(work / "model")
    # Heads of a width that a GPU takes, where there is one.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    save_llama(work / "model", len(tokenizer), hidden_size=64, num_hidden_layers=6, max_position_embeddings=4096, **heads)
    for name, target in {"model.gguf": work / "model", "examples": ROOT / "examples"}.items():
        (work / name).symlink_to(target)
    for name in ("book.txt", "code.txt"):
        (work / name).write_text(TEXT, encoding="utf-8")
    sizes = {"layers": 6, "query_heads": 8, "kv_heads": 4, "head_dim": 64}
    save_learned(work / "model.pbs", sizes=sizes)
    settings = blocks(ROOT / "docs/transformers.md", "json")
    (work / "minference.json").write_text(settings[0].text, encoding="utf-8")
    return work


@pytest.mark.parametrize(
    "page", [page for page in USER_PAGES if blocks(page, "python")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_programs(page, work, monkeypatch):
    monkeypatch.chdir(work)
    names = {"pbsattn": pbsattn}
    if "model" in page.read_text(encoding="utf-8"):
        names["model"] = transformers.AutoModelForCausalLM.from_pretrained(work / "model").eval()
        names["inputs"] = {"input_ids": torch.arange(600)[None] % 8}
    ran = [block for block in blocks(page, "python") if not block.needs]
    assert ran
    for block in ran:
        exec(compile(block.text, f"{page.name}: {block.text.splitlines()[0]}", "exec"), names)


def test_commands(work, monkeypatch, capsys):
    """Each in the order of its page, since some read what those before wrote; in this process, which has PyTorch already."""
    monkeypatch.chdir(work)
    told = list(dict.fromkeys(command for _, command in commands(PYTHON)))
    assert any(" ppl " in command for command in told) and any("generate.py" in command for command in told)
    for command in told:
        words = shlex.split(command)[1:]
        for option, less in LESS.items():
            if option in words:
                words[words.index(option) + 1] = less
        monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        assert not status, f"{command}: {status}, {printed.err}"
        assert printed.out or "report" in command, command
