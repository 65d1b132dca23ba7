#!/usr/bin/env python3
"""Tests of ./dev, and of the tools it calls, where something is missing or misnamed: one line, and nothing done."""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).parents[2]


class Dev(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        (self.folder / "bin").mkdir()

    def program(self, name, script):
        """Puts a program of that name before all others."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def refused(self, *command, says, **environment):
        run = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "XDG_CACHE_HOME": str(self.folder / "cache"),
                **environment,
            },
        )
        self.assertNotEqual(run.returncode, 0)
        self.assertEqual(run.stdout, "")
        self.assertRegex(run.stderr, r"\A[^\n]+\n\Z")
        for word in says:
            self.assertIn(word, run.stderr)
        self.assertFalse((self.folder / "installed").exists(), "nothing may be installed")

    def without_packages(self, user):
        self.program("dpkg-query", "exit 1")
        self.program("id", f"echo {user}")
        self.program("apt-get", f"touch {self.folder}/installed")

    def test_setup_without_root_lists_what_is_missing(self):
        self.without_packages(user=1000)
        for command in (["setup"], ["build"], ["test"], ["demo"]):
            self.refused("./dev", *command, says=["missing packages", "sudo apt-get install", "libhwy-dev", "cmake"])

    def test_packages_that_cannot_be_had(self):
        self.without_packages(user=0)
        self.program("apt-get", "exit 100")
        run = subprocess.run(
            ["./dev", "setup"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
        )
        self.assertNotEqual(run.returncode, 0)
        self.assertIn("apt-get failed", run.stderr.splitlines()[-1])

    def test_old_compiler(self):
        self.program("dpkg-query", "echo install ok installed")
        self.program("g++", "echo 11")
        self.refused("./dev", "setup", says=["g++ 11", "12 or later", "CXX=g++-12"])

    def test_names_that_are_none(self):
        self.program("dpkg-query", "echo install ok installed")
        self.refused("./dev", "tset", says=['"tset"', "./dev help"])
        self.refused("./dev", "build", "relaese", says=['"relaese"', "release, debug"])
        self.refused("./dev", "bench", says=["needs a suite", "cpu"])
        self.refused("./dev", "demo", "--model", "gpt-2", says=['"gpt-2"', "smollm2-135m"])
        self.refused("./dev", "demo", "--fast", says=["--fast", "no such option"])
        self.refused("./dev", "format", "--chekc", says=["--chekc", "--check"])
        self.refused("./dev", "docs", "--open", says=["--open", "none"])
        self.refused("./dev", "sanitize", "adress", says=["adress", "address, thread"])
        self.refused("./dev", "check", "pahts", says=["pahts", "paths"])
        self.refused("./dev", "check", "--fuzz-seconds", "0", says=["--fuzz-seconds 0", "from 1 up"])
        self.refused("./dev", "fuzz", "soon", says=["soon", "seconds"])
        self.refused(sys.executable, "tools/models.py", "get", "gpt-2", says=['"gpt-2"', "smollm2-135m"])

    def test_gpu_sanitizers_without_their_tool_or_a_gpu(self):
        self.program("nvidia-smi", "exit 9")
        self.refused("./dev", "sanitize", "gpu", says=["compute-sanitizer", "cuda-sanitizer"], CUDA_PATH=str(self.folder))
        self.program("compute-sanitizer", "exit 0")
        self.refused("./dev", "sanitize", "gpu", says=["no GPU", "Hopper"], CUDA_PATH=str(self.folder))

    def test_half_a_llama_cpp(self):
        tool = (sys.executable, "tools/llama.py", "libraries")
        self.refused(*tool, says=["go together"], PBSATTN_LLAMA_SOURCE="/tmp")
        self.refused(
            *tool,
            says=[str(self.folder), "include/llama.h"],
            PBSATTN_LLAMA_SOURCE=str(self.folder),
            PBSATTN_LLAMA_BUILD=str(self.folder),
        )

    def test_cache_that_cannot_be_written(self):
        (self.folder / "cache").write_text("a file where a folder should be")
        self.refused(sys.executable, "tools/models.py", "get", "smollm2-135m", says=["cache", "set XDG_CACHE_HOME"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
