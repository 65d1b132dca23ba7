#!/usr/bin/env python3
"""Tests of the pages: what they point to is there, what they name by its name is known by it, and every command is run."""

import json
import pathlib
import re
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))

from pages import PAGES, PROGRAM, PYTHON, USER_PAGES, blocks  # noqa: E402

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LANGUAGES = {"sh", "python", "cpp", "c", "cmake", "json", "text"}

# Commands that other tests run, by their beginning: the file, and what stands in it.
ELSEWHERE = {
    "pip install .": ("dev", "-m pip install"),
    "pip install '.[transformers]'": ("pyproject.toml", "\ntransformers = ["),  # the same, with what the extra names
    "./dev build": ("dev", "build release\n"),
    "cmake -B build/library": ("tests/CMakeLists.txt", "NAME examples_against_install"),  # of whose build it is a part
    "cmake --install build/library": ("tests/install/examples.cmake", "--install ${BUILD}"),
    "cmake -S examples": ("tests/install/examples.cmake", "-S ${SOURCE}/examples"),
    "build/examples/prefill": ("tests/install/examples.cmake", "foreach(example prefill prefill_c by_head)"),
    "build/examples/by_head": ("tests/install/examples.cmake", "foreach(example prefill prefill_c by_head)"),
}


def anchors(page):
    """The names that a page's headings can be linked by."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(page.read_text())}


def links(page):
    """A page's links, but for those in code."""
    return LINK.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))


class Pages(unittest.TestCase):
    def test_links_lead_somewhere(self):
        for page in PAGES:
            for link in links(page):
                if "://" in link:
                    continue
                path, _, anchor = link.partition("#")
                target = page.parent / path if path else page
                with self.subTest(page=page.name, link=link):
                    self.assertTrue(target.exists())
                    if anchor:
                        self.assertIn(anchor, anchors(target))

    def test_every_page_is_linked_from_the_first(self):
        aside = {path for folder in (".github", ".gitlab", "docs/site") for path in (ROOT / folder).rglob("*.md")}
        reached, ahead = {ROOT / "README.md"}, [ROOT / "README.md"]
        while ahead:
            page = ahead.pop()
            near = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
            ahead += [target for target in PAGES if target in near and target not in reached]
            reached |= near
        self.assertEqual([page for page in PAGES if page not in reached | aside], [])

    def test_user_pages_are_short(self):
        for page in USER_PAGES:
            self.assertLessEqual(len(page.read_text().splitlines()), 150, page)

    def test_tables_are_what_the_records_say(self):
        checked = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
        self.assertEqual((checked.returncode, checked.stderr), (0, ""))

    def test_dev_commands_exist(self):
        known = re.search(r"^  help(?:.|\n)*?esac", (ROOT / "dev").read_text(), re.MULTILINE).group()
        for page in PAGES:
            for command in re.findall(r"\./dev (\w+)", page.read_text()):
                self.assertRegex(known, rf"\b{command}\b", page.name)

    def test_variables_are_those_that_are_read(self):
        read = set(re.findall(r'"(PBSATTN_\w*)"', (ROOT / "integrations/ggml/settings.cc").read_text()))
        read.remove("PBSATTN_")  # and each option's name in capitals after it
        options = re.findall(r'Row\{"(\w+)"', (ROOT / "include/pbsattn/options.hpp").read_text())
        read |= {f"PBSATTN_{option.upper()}" for option in options}
        cells = re.findall(r"^\| (`PBSATTN_[^|]+)", (ROOT / "docs/llama.cpp.md").read_text(), re.MULTILINE)
        told = set(re.findall(r"PBSATTN_\w+", " ".join(cells)))
        self.assertEqual(told, read)

    def test_files_that_are_told_of_exist(self):
        for page in PAGES:
            for path in re.findall(r"`((?:src|tools|tests|bench|apps|integrations|cmake)/[\w./-]+\.\w+)`", page.read_text()):
                with self.subTest(page=page.name, path=path):
                    self.assertTrue((ROOT / path).exists())


class Blocks(unittest.TestCase):
    def test_each_has_a_language(self):
        for page in [*USER_PAGES, ROOT / "CONTRIBUTING.md"]:
            for block in blocks(page):
                self.assertIn(block.language, LANGUAGES, f"{page}: {block.text}")

    def test_each_command_runs_in_a_test_or_says_what_it_needs(self):
        for page in [*USER_PAGES, ROOT / "CONTRIBUTING.md"]:
            for block in blocks(page, "sh"):
                for command in [] if block.needs else block.commands:
                    with self.subTest(page=page.name, command=command):
                        self.assertTrue(
                            any(map(command.startswith, (*PROGRAM, *PYTHON, *ELSEWHERE))),
                            "no test runs it; run it in one, or begin its block with: # needs: WHAT",
                        )

    def test_commands_that_run_elsewhere_do(self):
        for command, (path, text) in ELSEWHERE.items():
            self.assertIn(text, (ROOT / path).read_text(), command)

    def test_json_is_json(self):
        for page in USER_PAGES:
            for block in blocks(page, "json"):
                json.loads(block.text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
