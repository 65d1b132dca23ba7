#!/usr/bin/env python3
"""Tests of tools/skips.py on what the test runners write."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

TOOL = pathlib.Path(__file__).parents[2] / "tools/skips.py"
LOG = """2/3 Testing: cpu_test
[ RUN      ] Amx.One
../../tests/cpu/amx_test.cc:23: Skipped
no such path; build one
[  SKIPPED ] Amx.One (0 ms)
[ RUN      ] Amx.Two
[       OK ] Amx.Two (3 ms)
[==========] 2 tests ran. (3 ms total)
[  SKIPPED ] 1 test, listed below:
[  SKIPPED ] Amx.One
3/3 Testing: app_test
test_unreadable (__main__.Prompts.test_unreadable) ... skipped 'root may read every file'
test_other (__main__.Prompts.test_other)
With words on it. ... skipped "it isn't there"
test_good (__main__.Prompts.test_good) ... ok
Ran 3 tests in 0.1s
"""
XML = """<?xml version="1.0"?><testsuites><testsuite tests="3">
<testcase classname="tests.python.test_op" name="test_graph[cpu]"><skipped message="graphs are CUDA's"/></testcase>
<testcase classname="tests.python.test_op" name="test_plan[cpu]"/>
<testcase name="cuda_test" classname="cuda_test" status="notrun"><skipped message="SKIP_RETURN_CODE=77"/></testcase>
</testsuite></testsuites>"""
ALLOWED = """# what may be
Amx.*: no such path* | needs AMX
test_unreadable: * | needs another user
test_other: it isn't there | is never there
tests.python.test_op::test_graph[*: graphs are CUDA's | needs a GPU
cuda_test: SKIP_* | needs a GPU
"""


class Skips(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_tool(self, *results, allowed=ALLOWED):
        (self.folder / "allowed.txt").write_text(allowed)
        paths = []
        for name, text in results:
            paths.append(str(self.folder / name))
            (self.folder / name).write_text(text)
        return subprocess.run(
            [sys.executable, TOOL, "--allowed", str(self.folder / "allowed.txt"), *paths], capture_output=True, text=True
        )

    def test_all_allowed(self):
        run = self.run_tool(("LastTest.log", LOG), ("tests.xml", XML))
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertEqual(
            run.stdout.splitlines(),
            [
                "skipped: Amx.One: no such path; build one (needs AMX)",
                "skipped: cuda_test: SKIP_RETURN_CODE=77 (needs a GPU)",
                "skipped: test_other: it isn't there (is never there)",
                "skipped: test_unreadable: root may read every file (needs another user)",
                "skipped: tests.python.test_op::test_graph[cpu]: graphs are CUDA's (needs a GPU)",
            ],
        )

    def test_one_that_is_not(self):
        lines = ALLOWED.splitlines(keepends=True)
        for left_out, named in (
            (1, "Amx.One"),
            (2, "test_unreadable"),
            (3, "test_other"),
            (4, "test_graph[cpu]"),
            (5, "cuda_test"),
        ):
            run = self.run_tool(
                ("LastTest.log", LOG), ("tests.xml", XML), allowed="".join(lines[:left_out] + lines[left_out + 1 :])
            )
            self.assertEqual(run.returncode, 1)
            refused = [line for line in run.stdout.splitlines() if line.endswith("(NOT ALLOWED)")]
            self.assertEqual(len(refused), 1)
            self.assertIn(named, refused[0])
            self.assertRegex(run.stderr, r"\A[^\n]*1 test\(s\) skipped[^\n]*allowed.txt[^\n]*\n\Z")

    def test_another_reason_than_the_list_has(self):
        run = self.run_tool(
            ("LastTest.log", LOG.replace("root may", "nobody may")),
            allowed=ALLOWED.replace("test_unreadable: *", "test_unreadable: root may read every file"),
        )
        self.assertEqual(run.returncode, 1)

    def test_results_without_a_test(self):
        for name, text in (("LastTest.log", "Start testing: Nov 30\n"), ("tests.xml", "<testsuites/>")):
            run = self.run_tool((name, text))
            self.assertEqual(run.returncode, 1)
            self.assertIn("holds no test", run.stderr)

    def test_a_line_without_a_reason(self):
        run = self.run_tool(("LastTest.log", LOG), allowed="Amx.*: no such path*\n")
        self.assertEqual(run.returncode, 1)
        self.assertIn("line 1", run.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
