#!/usr/bin/env python3
"""Tests of the pbsattn program: app_test.py PROGRAM

PBSATTN_TEST_MODEL names SmolLM2's GGUF file and PBSATTN_TEST_TEXT a long text; `./dev test` sets both.
"""

import json
import unittest

from app_cases import Case, pbsattn
from app_files import Models, OutputFiles, Prompts, StandardOutput
from app_model import Mask, Prefill

__all__ = ["Mask", "Models", "OutputFiles", "Prefill", "Prompts", "StandardOutput"]  # which unittest finds here


class Tables(Case):
    def test_methods(self):
        listed = json.loads(pbsattn("methods", "--json").stdout)
        names = [method["name"] for method in listed]
        self.assertIn("full", names)
        pbs = next(method for method in listed if method["name"] == "pbs")
        self.assertEqual(pbs["options"]["segment"], 256)
        text = pbsattn("methods").stdout
        for name in names:
            self.assertIn(f"\n{name} ", "\n" + text)

    def test_devices(self):
        cpu = json.loads(pbsattn("devices", "--json").stdout)[0]
        self.assertEqual(cpu["name"], "cpu")
        self.assertGreaterEqual(cpu["threads"], 1)
        self.assertIn(cpu["f32_path"], cpu["paths"])
        self.assertIn(cpu["bf16_path"], cpu["paths"])
        self.assertIn(cpu["f32_path"], pbsattn("devices").stdout)

    def test_learned(self):
        path = self.learned(settings='{"1": {"*": {"permutation": "none"}}}')
        text = pbsattn("learned", path).stdout
        for line in (
            "model      tiny?net",
            "fitted on  noise",
            "sizes      2 layers, 4 query heads, 2 KV heads, head_dim 8",
        ):
            self.assertIn(line + "\n", text)
        self.assertRegex(text, r"\n +0 +1 of 2 +0\.5\n +1 +2 of 2 +2\n")
        read = json.loads(pbsattn("learned", path, "--json").stdout)
        self.assertEqual((read["model"], read["pairs"], read["head_dim"]), ("tiny\nnet", "halves", 8))
        self.assertEqual(read["settings"], {"1": {"*": {"permutation": "none"}}})
        self.assertEqual(read["weights"][1], {"layer": 1, "ordered_kv_heads": 2, "largest_weight": 2})
        self.refused(2, "learned", says=["file is required"])
        self.refused(1, "learned", self.folder, says=[str(self.folder), "can't be read"])
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(1, "learned", path, says=[str(path), "truncated"])

    def test_help(self):
        for arguments in (["--help"], ["prefill", "--help"], ["mask", "--help"], ["learned", "--help"], ["--version"]):
            result = pbsattn(*arguments)
            self.assertEqual((result.returncode, result.stderr), (0, ""), arguments)


class CommandLine(Case):
    """What is wrong whatever the files hold. The model named does not exist: these come first."""

    def usage(self, *arguments, says):
        text = self.file("text.txt", b"some words")
        self.refused(2, "prefill", "--model", "none.gguf", "--prompt-file", text, *arguments, says=says)

    def test_no_such_command(self):
        self.refused(2, "prefil", says=['"prefil"', "prefill, mask"])
        for command in ("eval", "report"):
            self.refused(
                2, command, "ppl", says=[command, "python -m pbsattn_eval", "integrations/python/pbsattn_eval", "./dev"]
            )

    def test_no_command(self):
        self.refused(2, says=["subcommand is required"])

    def test_missing_options(self):
        self.refused(2, "prefill", says=["--model is required"])

    def test_unknown_option(self):
        self.usage("--topp", "0.9", says=["--topp", "not expected"])

    def test_top_p(self):
        for value in ("0", "-0.5", "1.5", "nan", "inf"):
            self.usage("--top-p", value, says=["top_p", "(0, 1]"])
        self.usage("--top-p", "most", says=["--top-p = most"])

    def test_segment(self):
        for value in ("0", "-256", "64", "200"):
            self.usage("--segment", value, says=[f"segment {value}", "block of 128"])

    def test_dense_last_rows(self):
        self.usage("--dense-last-rows", "-1", says=["dense_last_rows -1"])

    def test_precision(self):
        self.usage("--precision", "fp8", says=['"fp8"', "f32, bf16"])

    def test_method(self):
        self.usage("--method", "pbz", says=['"pbz"', 'did you mean "pbs"'])
        self.usage("--compare", "ggml,ful", says=['"ful"', 'did you mean "full"'])

    def test_options_of_a_method(self):
        for spec, says in (
            ("pbs:top_p=1.5", ["top_p 1.5", "(0, 1]"]),
            ("pbs:top_p=much", ['top_p "much"', "not a number"]),
            ("pbs:top_p", ['"top_p"', "OPTION=VALUE"]),
            ("pbs:p=1", ['"p"', "top_p, threshold"]),
            ("pbs:keep=most", ['"most"', "relative, top_k"]),
            ("pbs:score=none", ["no score"]),
            ("pbs:segment=100", ["segment 100"]),
            ("pbs:softcap=nan", ["softcap nan", "0 stands for none"]),
            ("pbs:softcap=inf", ["softcap inf"]),
            ("pbs:softcap=-1", ["softcap -1"]),
            ("pbs:rules=mine", ['"mine"', "reference_code, paper"]),
            ("ggml:top_p=1", ["ggml:top_p=1", "no options"]),
        ):
            self.usage("--compare", spec, says=says)
            self.usage("--method", spec, says=says)

    def test_learned_orders_come_from_files(self):
        self.usage("--method", "learned", says=["learned: ", "--learned"])
        for flag in ("--compare", "--method"):
            self.usage(flag, "pbs:permutation=learned:order_scope=kv_head", says=["permutation learned", "--learned"])
        for command in (("prefill",), ("mask", "--out", self.folder / "mask.svg")):
            given = (*command, "--model", "none.gguf", "--prompt-file", self.file("text.txt", b"some words"), "--learned")
            self.refused(1, *given, "none.pbs", says=["none.pbs", "can't be read"])
            self.refused(1, *given, self.learned(), says=["none.gguf"])

    def test_parts_are_the_methods_under_test(self):
        text = self.file("text.txt", b"some words")
        for command in (("prefill", "--method", "pbs"), ("mask", "--out", self.folder / "mask.svg")):
            # What is wrong is the model alone: neither the full attention beside the method nor the method is refused.
            self.refused(1, *command, "--model", "none.gguf", "--prompt-file", text, "--keep", "top_k", says=["none.gguf"])
            self.refused(2, *command, "--model", "none.gguf", "--prompt-file", text, "--score", "none", says=["no score"])

    def test_numbers(self):
        for option in ("--tokens", "--context", "--generate", "--threads"):
            self.usage(option, "-1", says=[f"{option} -1", "outside 0"])
            self.usage(option, "99999999999999999999", says=[option])
        self.usage("--threads", "100000", says=["--threads 100000", "512"])
        for value in ("-1", "256"):
            self.usage("--ubatch", value, says=[f"--ubatch {value}", "257"])
        for value in ("0", "-5", "some", "5x"):
            self.usage("--positions", value, says=[f"--positions {value}", '"all"'])

    def test_output(self):
        text = self.file("text.txt", b"some words")
        for place in ("/no/such/folder/out.json", self.folder):
            self.refused(1, "prefill", "--model", "none.gguf", "--prompt-file", text, "--json", place, says=["output file"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
