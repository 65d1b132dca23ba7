#!/usr/bin/env python3
"""Runs the commands of the user pages that start the program or the llama.cpp plug-in: docs_test.py BUILD LLAMA_BIN

BUILD is this build's folder, LLAMA_BIN the one with llama.cpp's tools. The model and the text are app_test.py's; of the
text only the beginning goes in: prefill runs a prompt several times, and once more where the machine was disturbed.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

from pages import PROGRAM, ROOT, commands

LLAMA_BIN, BUILD = pathlib.Path(sys.argv.pop()), pathlib.Path(sys.argv.pop())
MODEL = os.environ.get("PBSATTN_TEST_MODEL", "")
TEXT = os.environ.get("PBSATTN_TEST_TEXT", "")
LETTERS = 1300  # some 300 tokens, more than a segment
TOOL_LETTERS = 6000  # some 1400 tokens: llama-perplexity asks for twice its context


@unittest.skipUnless(MODEL and TEXT, "PBSATTN_TEST_MODEL and PBSATTN_TEST_TEXT name no model and text")
class Commands(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        for name, target in {
            "build/release": BUILD,
            "llama.cpp/build/bin": LLAMA_BIN,
            "examples": ROOT / "examples",
            "model.gguf": MODEL,
        }.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).symlink_to(target)

    def run_command(self, command, letters):
        """What it printed, on so much text. `~` is the folder that it runs in."""
        (self.folder / "book.txt").write_bytes(pathlib.Path(TEXT).read_bytes()[:letters])
        ran = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env={**os.environ, "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.assertEqual(ran.returncode, 0, f"{command}: {ran.stdout}{ran.stderr}")
        return ran.stdout

    def test_of_the_program(self):
        told = sorted({command for _, command in commands(PROGRAM[:1])})
        self.assertTrue(any(" prefill " in command for command in told))
        for command in told:
            with self.subTest(command):
                printed = self.run_command(command, LETTERS)
                self.assertIn("auto" if " prefill" in command or " methods" in command else "cpu", printed)

    def test_of_the_plug_in(self):
        told = sorted({command for _, command in commands(PROGRAM[1:])})
        self.assertEqual(len(told), 1)
        printed = self.run_command(told[0], TOOL_LETTERS)
        self.assertEqual(printed.count("Final estimate"), 2, printed)
        self.assertIn("1 taken", printed)


if __name__ == "__main__":
    unittest.main(verbosity=2)
