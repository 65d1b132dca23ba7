#!/usr/bin/env python3
"""Tests of the pages: what they point to is there, and what they name by its name is known by it."""

import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for folder in ("docs", "results") for path in (ROOT / folder).rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page):
    """The names that a page's headings can be linked by."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(page.read_text())}


class Pages(unittest.TestCase):
    def test_links_lead_somewhere(self):
        for page in PAGES:
            for link in LINK.findall(page.read_text()):
                if "://" in link:
                    continue
                path, _, anchor = link.partition("#")
                target = page.parent / path if path else page
                with self.subTest(page=page.name, link=link):
                    self.assertTrue(target.exists())
                    if anchor:
                        self.assertIn(anchor, anchors(target))

    def test_every_page_is_linked_from_the_first(self):
        reached, ahead = {PAGES[0]}, [PAGES[0]]
        while ahead:
            page = ahead.pop()
            near = {(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text())}
            ahead += [target for target in PAGES if target in near and target not in reached]
            reached |= near
        self.assertEqual([page for page in PAGES if page not in reached], [])

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


if __name__ == "__main__":
    unittest.main(verbosity=2)
