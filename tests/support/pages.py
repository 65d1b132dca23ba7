"""The pages, and the commands and programs in their fenced blocks, for the tests that check and run them."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
USER_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(
        path
        for folder in ("docs", "results", "examples", "integrations", ".github", ".gitlab")
        for path in (ROOT / folder).rglob("*.md")
    ),
]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^(?:#|//) needs: .+")
PROGRAM = ("build/release/apps/", "examples/llama.cpp/")  # what tests/app/docs_test.py runs
PYTHON = ("python ",)  # what tests/python/test_docs.py runs, besides every block of Python


@dataclasses.dataclass
class Block:
    page: pathlib.Path
    language: str
    text: str

    @property
    def needs(self):
        """Whether its first line says that it needs what tests don't have."""
        return NEEDS.match(self.text) is not None

    @property
    def commands(self):
        """Its commands, each as one line, without comments."""
        whole = self.text.replace("\\\n", " ")
        return [" ".join(line.split()) for line in whole.splitlines() if line.strip() and not line.startswith("#")]


def blocks(page, *languages):
    """The fenced blocks of a page that are in one of these languages, all of them where none is named."""
    found = [Block(page, *block) for block in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if not languages or block.language in languages]


def commands(starts):
    """(page, command) of each command in user pages that tests run and that starts with one of `starts`."""
    return [
        (page, command)
        for page in USER_PAGES
        for block in blocks(page, "sh")
        if not block.needs
        for command in block.commands
        if command.startswith(starts)
    ]
