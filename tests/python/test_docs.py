"""Runs the Python of the user pages: programs in their blocks, and commands that start Python, on a tiny model."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

from conftest import TEXT  # noqa: E402
from pages import PYTHON, ROOT, USER_PAGES, blocks, commands  # noqa: E402

LENGTH = "512"  # in place of the tokens that the pages name


@pytest.fixture(scope="module")
def work(folder, tmp_path_factory):
    """A folder that has what the pages' commands name. Its model has the heads and layers that they name."""
    work = tmp_path_factory.mktemp("docs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(work / "model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096)).save_pretrained(work / "model")
    for name, target in {"model.gguf": work / "model", "examples": ROOT / "examples"}.items():
        (work / name).symlink_to(target)
    for name in ("book.txt", "code.txt"):
        (work / name).write_text(TEXT, encoding="utf-8")
    settings = blocks(ROOT / "docs/transformers.md", "json")
    (work / "minference.json").write_text(settings[0].text, encoding="utf-8")
    return work


@pytest.mark.parametrize("page", [page for page in USER_PAGES if blocks(page, "python")],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_programs(page, work, monkeypatch):
    monkeypatch.chdir(work)
    names = {}
    if "model" in page.read_text(encoding="utf-8"):
        names["model"] = transformers.AutoModelForCausalLM.from_pretrained(work / "model").eval()
        names["inputs"] = {"input_ids": torch.arange(600)[None] % 8}
    ran = [block for block in blocks(page, "python") if not block.needs]
    assert ran
    for block in ran:
        exec(compile(block.text, f"{page.name}: {block.text.splitlines()[0]}", "exec"), names)


def test_commands(work):
    """Each in the order of its page, since some read what those before wrote."""
    told = list(dict.fromkeys(command for _, command in commands(PYTHON)))
    assert any(" ppl " in command for command in told) and any("generate.py" in command for command in told)
    for command in told:
        short = re.sub(r"(--lengths|--tokens) [\d,]+", rf"\1 {LENGTH}", command).replace("--samples 20", "--samples 1")
        words = [sys.executable, *short.split()[1:]]
        ran = subprocess.run(words, cwd=work, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
        assert ran.stdout or "report" in command, command
