"""What app_test.py's tests share: the program, which is the first argument, its calls and what it refuses."""

import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import unittest

PROGRAM = sys.argv.pop(1)
MODEL = os.environ.get("PBSATTN_TEST_MODEL", "")
TEXT = os.environ.get("PBSATTN_TEST_TEXT", "")
needs_model = unittest.skipUnless(MODEL and TEXT, "PBSATTN_TEST_MODEL and PBSATTN_TEST_TEXT name no model and text")
PREFILL = ("prefill", "--model", MODEL, "--prompt-file", TEXT)
MASK = ("mask", *PREFILL[1:])
# A run of the model as short as can be.
BRIEF = (*PREFILL, *"--tokens 257 --generate 0 --compare none --positions 1 --segment 128 --threads 1".split())

# What a step that takes over a minute, on a slow machine, tells where there is no terminal.
PROGRESS = re.compile(r"^.+: \d+ % after \d+ s, .+\n", re.MULTILINE)


def pbsattn(*arguments, **settings):
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | settings
    result = subprocess.run([PROGRAM, *map(str, arguments)], text=True, timeout=600, **settings)
    result.stderr = PROGRESS.sub("", result.stderr)
    return result


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def file(self, name, content=b""):
        path = self.folder / name
        path.write_bytes(content)
        return path

    def learned(self, layers=2, query_heads=4, kv_heads=2, head_dim=8, settings="{}"):
        """The file of a learned order. The first KV head of its first layer has weights of 0."""
        features = head_dim * 3 // 2
        weights = [0.0] * features + [0.5] * (kv_heads - 1) * features + [-2.0] * (layers - 1) * kv_heads * features
        sizes = {"layers": layers, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        metadata = {"format": "pbsattn-learned-1", "pairs": "halves", "model": "tiny\nnet", "fitted_on": "noise"}
        metadata |= {name: str(size) for name, size in sizes.items()} | {"settings": settings}
        tensor = {"dtype": "F32", "shape": [layers, kv_heads, features], "data_offsets": [0, 4 * len(weights)]}
        header = json.dumps({"__metadata__": metadata, "order_weights": tensor}).encode()
        return self.file("tiny.pbs", struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(weights)}f", *weights))

    def refused(self, status, *arguments, says=()):
        """One line on stderr with every word of `says`, nothing on stdout, that status, no file left behind."""
        before = set(self.folder.iterdir())
        result = pbsattn(*arguments)
        self.assertEqual(result.returncode, status, result.stderr)
        self.assertEqual(result.stdout, "")
        self.assertRegex(result.stderr, r"\Apbsattn: [^\n]+\n\Z")
        for word in says:
            self.assertIn(word, result.stderr)
        self.assertEqual(set(self.folder.iterdir()), before)
