#!/usr/bin/env python3
"""Tests of what tools/wheels.py asks of a wheel, on small modules that the compiler makes."""

import pathlib
import subprocess
import sys
import tempfile
import unittest
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))
import wheels
from common import Failure

MODULE = "void *PyModule_New(const char *); void *PyInit__core(void) { return PyModule_New(__func__); }\n"
ASKS = """extern int of_a_later_libc;
#pragma GCC visibility push(hidden)
int *uses(void) { return &of_a_later_libc; }
"""


class Judge(unittest.TestCase):
    def wheel(self, source, tag="manylinux_2_28_x86_64"):
        """A wheel whose module is compiled from C."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        module = pathlib.Path(folder.name, "_core.so")
        compile_ = ["cc", "-x", "c", "-shared", "-fPIC", "-fvisibility=default", "-o", str(module), "-"]
        subprocess.run(compile_, input=source, text=True, check=True)
        wheel = pathlib.Path(folder.name, f"pbsattn-1.0-cp312-abi3-{tag}.whl")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(module, "pbsattn/_core.abi3.so")
        return wheel

    def refused(self, wheel, words):
        with self.assertRaisesRegex(Failure, words):
            wheels.judge(wheel)

    def test_tag(self):
        self.assertEqual(wheels.judge(self.wheel(MODULE)), "manylinux_2_28_x86_64")
        self.refused(self.wheel(MODULE, "linux_x86_64"), "linux_x86_64 is no manylinux tag")

    def test_exports(self):
        self.refused(self.wheel(MODULE + "void other(void) {}\n"), "pbsattn-1.0.* failed")

    def test_symbols_of_no_library(self):
        self.refused(self.wheel(MODULE + ASKS), "asks for of_a_later_libc, which no library has")
        self.assertTrue(wheels.judge(self.wheel(MODULE + ASKS.replace("extern", "extern __attribute__((weak))"))))


if __name__ == "__main__":
    unittest.main()
