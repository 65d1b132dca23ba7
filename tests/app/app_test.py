#!/usr/bin/env python3
"""Tests of the pbsattn program: app_test.py PROGRAM

PBSATTN_TEST_MODEL names SmolLM2's GGUF file and PBSATTN_TEST_TEXT a long text; `./dev test` sets both.
"""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

PROGRAM = sys.argv.pop(1)
MODEL = os.environ.get("PBSATTN_TEST_MODEL", "")
TEXT = os.environ.get("PBSATTN_TEST_TEXT", "")
needs_model = unittest.skipUnless(MODEL and TEXT, "PBSATTN_TEST_MODEL and PBSATTN_TEST_TEXT name no model and text")


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

    def test_help(self):
        for arguments in (["--help"], ["prefill", "--help"], ["mask", "--help"], ["--version"]):
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
            self.refused(2, command, "ppl", says=[command, "python -m pbsattn", "./dev"])

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
            ("pbs:rules=mine", ['"mine"', "reference_code, paper"]),
            ("ggml:top_p=1", ["ggml:top_p=1", "no options"]),
        ):
            self.usage("--compare", spec, says=says)
            self.usage("--method", spec, says=says)

    def test_numbers(self):
        for option in ("--tokens", "--context", "--generate", "--threads"):
            self.usage(option, "-1", says=[f"{option} -1", "outside 0"])
            self.usage(option, "99999999999999999999", says=[option])
        self.usage("--threads", "100000", says=["--threads 100000", "512"])
        for value in ("0", "-5", "some", "5x"):
            self.usage("--positions", value, says=[f"--positions {value}", '"all"'])

    def test_output(self):
        text = self.file("text.txt", b"some words")
        for place in ("/no/such/folder/out.json", self.folder):
            self.refused(1, "prefill", "--model", "none.gguf", "--prompt-file", text, "--json", place, says=["output file"])


# A run of the model as short as can be.
BRIEF = (
    "prefill",
    "--model",
    MODEL,
    "--prompt-file",
    TEXT,
    "--tokens",
    257,
    "--generate",
    0,
    "--compare",
    "none",
    "--positions",
    1,
    "--segment",
    128,
    "--threads",
    1,
)


class StandardOutput(Case):
    COMMANDS = (
        ("--help",),
        ("--version",),
        ("methods",),
        ("methods", "--json"),
        ("devices",),
        ("devices", "--json"),
        ("prefill", "--help"),
        ("mask", "--help"),
    )

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_full(self):
        commands = list(self.COMMANDS)
        if MODEL and TEXT:
            commands += [
                BRIEF,
                (*BRIEF, "--json"),
                (
                    "mask",
                    "--model",
                    MODEL,
                    "--prompt-file",
                    TEXT,
                    "--tokens",
                    257,
                    "--threads",
                    1,
                    "--out",
                    self.folder / "mask.svg",
                ),
            ]
        for command in commands:
            with self.subTest(command=command), open("/dev/full", "w") as full:
                result = pbsattn(*command, stdout=full)
                self.assertEqual(result.returncode, 1, result.stderr)
                self.assertRegex(result.stderr, r"\Apbsattn: standard output: No space left on device; [^\n]+\n\Z")

    def test_closed(self):
        for command in self.COMMANDS:
            with self.subTest(command=command):
                result = subprocess.run(
                    ["sh", "-c", 'exec "$0" "$@" >&-', PROGRAM, *map(str, command)],
                    capture_output=True,
                    text=True,
                    timeout=600,
                )
                self.assertEqual(result.returncode, 1, result.stderr)
                self.assertRegex(PROGRESS.sub("", result.stderr), r"\Apbsattn: standard output: [^\n]+\n\Z")

    def test_nobody_reads(self):
        # As under `| head` once that has what it wants; with Python's signals or a shell's.
        for command in self.COMMANDS:
            for restore_signals in (True, False):
                with self.subTest(command=command, restore_signals=restore_signals):
                    reading, writing = os.pipe()
                    os.close(reading)
                    result = pbsattn(*command, stdout=writing, restore_signals=restore_signals)
                    os.close(writing)
                    self.assertEqual((result.returncode, result.stderr), (128 + signal.SIGPIPE, ""))


class OutputFiles(Case):
    def refused_with(self, place, says):
        text = self.file("text.txt", b"some words")
        self.refused(1, "prefill", "--model", "none.gguf", "--prompt-file", text, "--json", place, says=says)

    def link(self, name, target):
        link = self.folder / name
        link.symlink_to(target)
        return link

    def test_what_a_link_names_stays_when_the_run_fails(self):
        target = self.file("report.json", b"of yesterday")
        link = self.link("link.json", "report.json")
        self.refused_with(link, ["none.gguf"])
        self.assertTrue(link.is_symlink())
        self.assertEqual(target.read_bytes(), b"of yesterday")

    def test_link_that_leads_nowhere(self):
        self.link("second.json", "first.json")
        self.refused_with(self.link("first.json", "second.json"), ["first.json", "symbolic links"])
        self.refused_with(self.link("into.json", "no/such/folder.json"), ["into.json", "No such file"])

    def test_standard_output_by_its_name(self):
        text = self.file("text.txt", b"some words")
        out = self.folder / "out.txt"
        with open(out, "w") as file:
            result = pbsattn("prefill", "--model", "none.gguf", "--prompt-file", text, "--json", "/dev/stdout", stdout=file)
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertIn("/dev/stdout: it is the standard output", result.stderr)
        self.assertTrue(os.path.islink("/dev/stdout"))

    def report_into(self, place):
        result = pbsattn(*BRIEF, "--json", place)
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    @needs_model
    def test_link_is_written_through(self):
        (self.folder / "kept").mkdir()
        old = self.file("kept/old.json", b"of yesterday")
        chain = self.link("kept/chain.json", "old.json")
        outer = self.link("outer.json", "kept/chain.json")
        self.report_into(outer)
        self.assertEqual(os.readlink(outer), "kept/chain.json")
        self.assertEqual(os.readlink(chain), "old.json")
        self.assertEqual(json.loads(old.read_text())["prompt"]["tokens"], 257)
        new = self.link("new.json", "kept/none-yet.json")
        self.report_into(new)
        self.assertEqual(os.readlink(new), "kept/none-yet.json")
        self.assertEqual(json.loads((self.folder / "kept/none-yet.json").read_text())["prompt"]["tokens"], 257)
        self.assertEqual(
            {path.name for path in self.folder.rglob("*")},
            {"kept", "old.json", "chain.json", "outer.json", "new.json", "none-yet.json"},
        )

    @needs_model
    def test_named_pipe(self):
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
            self.report_into(pipe)
            self.assertEqual(json.loads(reader.communicate(timeout=60)[0])["prompt"]["tokens"], 257)


class Prompts(Case):
    def prompt(self, path, says):
        self.refused(1, "prefill", "--model", "none.gguf", "--prompt-file", path, says=says)

    def test_missing(self):
        self.prompt(self.folder / "none.txt", ["none.txt", "No such file"])

    def test_empty(self):
        self.prompt(self.file("empty.txt"), ["empty.txt", "empty"])

    def test_directory(self):
        self.prompt(self.folder, ["a directory"])

    @unittest.skipIf(os.geteuid() == 0, "root may read every file")
    def test_unreadable(self):
        path = self.file("secret.txt", b"words")
        path.chmod(0)
        self.prompt(path, ["secret.txt", "Permission denied"])

    def test_not_utf8(self):
        for bad in (b"\xff", b"\xc0\x80", b"\xe2\x82", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80"):
            self.prompt(self.file("bad.txt", b"abc" + bad), ["byte 3", "not UTF-8"])

    def test_utf8_is_taken(self):
        path = self.file("good.txt", "aé漢😀".encode())
        self.refused(1, "prefill", "--model", "none.gguf", "--prompt-file", path, says=["model none.gguf"])

    def test_endless(self):
        self.prompt("/dev/zero", ["/dev/zero", "64 MiB"])


class Models(Case):
    def model(self, path, says):
        text = self.file("text.txt", b"some words")
        self.refused(1, "prefill", "--model", path, "--prompt-file", text, says=says)

    def test_missing(self):
        self.model(self.folder / "none.gguf", ["none.gguf", "No such file"])

    def test_directory(self):
        self.model(self.folder, ["a directory"])

    def test_not_gguf(self):
        self.model(self.file("text.gguf", b"GGML and more"), ["text.gguf", "not a GGUF file"])
        self.model(self.file("short.gguf", b"GG"), ["short.gguf", "not a GGUF file"])

    def test_only_magic(self):
        self.model(self.file("magic.gguf", b"GGUF"), ["magic.gguf", "is it whole"])

    @needs_model
    def test_truncated(self):
        whole = pathlib.Path(MODEL).read_bytes()
        for size in (100, 1_000_000, len(whole) // 2, len(whole) - 1):
            self.model(self.file("truncated.gguf", whole[:size]), ["truncated.gguf", "is it whole"])


@needs_model
class Prefill(Case):
    def refused_prefill(self, status, *arguments, says):
        self.refused(status, "prefill", "--model", MODEL, "--prompt-file", TEXT, *arguments, says=says)

    def test_short(self):
        self.refused_prefill(1, "--tokens", 256, says=["256 tokens", "257"])
        self.refused_prefill(1, "--tokens", 512, "--segment", 512, says=["512 tokens", "513"])

    def test_long(self):
        self.refused_prefill(1, says=["over the context of 8192", "--tokens 8160"])
        self.refused_prefill(1, "--tokens", 500, "--context", 400, says=["over the context of 400", "--tokens 368"])

    def test_fewer_tokens_than_asked(self):
        text = self.file("short.txt", b"only a few words")
        self.refused(1, "prefill", "--model", MODEL, "--prompt-file", text, "--tokens", 1000, says=["--tokens 1000"])

    def test_context_over_the_models(self):
        self.refused_prefill(2, "--context", 8193, says=["--context 8193", "8192"])

    def test_table_and_json(self):
        out = self.folder / "out.json"
        result = pbsattn(
            "prefill",
            "--model",
            MODEL,
            "--prompt-file",
            TEXT,
            "--tokens",
            1500,
            "--generate",
            4,
            "--positions",
            40,
            "--top-p",
            0.5,
            "--json",
            out,
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        for word in ("first token", "ggml ", "full ", "pbs ", "Greedy continuations"):
            self.assertIn(word, result.stdout)
        report = json.loads(out.read_text())
        self.assertEqual(report["prompt"]["tokens"], 1500)
        self.assertEqual(report["model"]["layers"], 30)
        self.assertEqual((report["baseline"], report["reference"]), ("ggml", "full"))
        self.assertEqual(report["positions"], 41)
        runs = {run["name"]: run for run in report["runs"]}
        self.assertEqual(list(runs), ["ggml", "full", "pbs"])
        for run in runs.values():
            self.assertGreater(run["first_token_seconds"], run["attention_seconds"])
            self.assertGreater(run["attention_seconds"], 0)
            self.assertEqual(len(run["layers"]), 30)
            self.assertEqual(len(run["continuation"]["tokens"]), 4)
        self.assertEqual(runs["ggml"]["speedup"], 1)
        self.assertEqual(runs["full"]["density"]["mean"], 1)
        self.assertLess(runs["pbs"]["density"]["mean"], 0.9)
        self.assertLessEqual(runs["pbs"]["density"]["min"], runs["pbs"]["density"]["mean"])
        self.assertNotIn("kl_mean", runs["full"])
        # The paired change is the same as that of the two perplexities; pairing only says how sure it is.
        change = runs["pbs"]["nll_change"]
        self.assertAlmostEqual(change["mean"], math.log(runs["pbs"]["perplexity"] / runs["full"]["perplexity"]), 6)
        self.assertGreater(change["standard_error"], 0)
        # Our dense attention is ggml's up to rounding; dropping blocks moves the distributions much further.
        self.assertLess(2 * runs["ggml"]["kl_mean"], runs["pbs"]["kl_mean"])
        self.assertGreater(runs["ggml"]["top1_mean"], 0.5)

    def test_json_on_the_standard_output_and_one_run(self):
        result = pbsattn(
            "prefill",
            "--model",
            MODEL,
            "--prompt-file",
            TEXT,
            "--tokens",
            300,
            "--generate",
            0,
            "--compare",
            "none",
            "--method",
            "ggml",
            "--positions",
            "all",
            "--json",
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        report = json.loads(result.stdout)
        self.assertEqual([run["name"] for run in report["runs"]], ["ggml"])
        self.assertEqual(report["positions"], 300)
        self.assertNotIn("each", report["runs"][0])

    def test_tokens_by_number_and_every_position(self):
        ids = self.file("prompt.ids", " ".join(str(100 + i % 90) for i in range(600)).encode())
        result = pbsattn(
            "prefill",
            "--model",
            MODEL,
            "--prompt-file",
            ids,
            "--token-ids",
            "--generate",
            0,
            "--compare",
            "full",
            "--method",
            "pbs:top_p=0.3",
            "--positions",
            "all",
            "--each",
            "--json",
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        full, pbs = json.loads(result.stdout)["runs"]
        self.assertEqual(full["each"]["position"], list(range(599)))
        self.assertEqual((full["each"]["kl"], len(pbs["each"]["kl"]), len(pbs["each"]["same_top1"])), ([], 599, 599))
        self.assertAlmostEqual(math.exp(sum(pbs["each"]["nll"]) / 599), pbs["perplexity"], 6)
        change = sum(a - b for a, b in zip(pbs["each"]["nll"], full["each"]["nll"])) / 599
        self.assertAlmostEqual(change, pbs["nll_change"]["mean"], 6)
        for word in ("x", "-1", "10000000"):
            ids = self.file("prompt.ids", f"5 {word} 7".encode())
            self.refused(1, "prefill", "--model", MODEL, "--prompt-file", ids, "--token-ids", says=[f'"{word}" is no token'])

    def test_top_p_one_is_dense(self):
        result = pbsattn(
            "prefill",
            "--model",
            MODEL,
            "--prompt-file",
            TEXT,
            "--tokens",
            700,
            "--generate",
            0,
            "--compare",
            "full,pbs:top_p=0.5:segment=128",
            "--top-p",
            1,
            "--json",
        )
        runs = json.loads(result.stdout)["runs"]
        self.assertEqual([run["name"] for run in runs], ["full", "pbs:top_p=0.5:segment=128", "pbs"])
        self.assertEqual((runs[1]["options"]["top_p"], runs[1]["options"]["segment"]), (0.5, 128))
        self.assertLess(runs[1]["density"]["mean"], 1)
        sparse = runs.pop(1)
        self.assertEqual(runs[1]["density"]["mean"], 1)
        # What is left is rounding: far less than dropping blocks does, on any processor.
        self.assertLess(2 * runs[1]["kl_mean"], sparse["kl_mean"])
        change = runs[1]["nll_change"]
        self.assertLessEqual(abs(change["mean"]), 6 * change["standard_error"])

    def test_interrupt(self):
        out = self.folder / "out.json"
        for number, word in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
            with self.subTest(word):
                process = subprocess.Popen(
                    [PROGRAM, "prefill", "--model", MODEL, "--prompt-file", TEXT, "--tokens", "8000", "--json", str(out)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                while not list(self.folder.iterdir()):  # the file that is written, before it has its name
                    self.assertIsNone(process.poll())
                    time.sleep(0.01)
                process.send_signal(number)
                stdout, stderr = process.communicate(timeout=600)
                self.assertEqual(process.returncode, 128 + number, stderr)
                self.assertEqual(stdout, "")
                self.assertRegex(PROGRESS.sub("", stderr), rf"\Apbsattn: {word}[^\n]*\n\Z")
                self.assertEqual(list(self.folder.iterdir()), [])


@needs_model
class Mask(Case):
    def test_picture(self):
        out = self.folder / "mask.svg"
        result = pbsattn(
            "mask", "--model", MODEL, "--prompt-file", TEXT, "--tokens", 1200, "--layer", 2, "--head", 3, "--out", out
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        svg = xml.etree.ElementTree.fromstring(out.read_text())
        kept = [path for path in svg.iter("{http://www.w3.org/2000/svg}path") if path.get("class") == "kept"]
        self.assertEqual(len(kept), 2)
        # Two pictures of one head that differ: the second has its keys permuted.
        first, second = (path.get("d").count("M") for path in kept)
        self.assertGreaterEqual(min(first, second), 10)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["mask.svg"])

    def test_refusals(self):
        base = ("mask", "--model", MODEL, "--prompt-file", TEXT, "--tokens", 600)
        out = self.folder / "mask.svg"
        self.refused(2, *base, "--out", out, "--layer", 30, says=["--layer 30", "0 to 29"])
        self.refused(2, *base, "--out", out, "--head", -1, says=["--head -1", "0 to 8"])
        self.refused(1, *base, "--out", "/no/such/folder/mask.svg", says=["output file"])
        self.refused(1, "mask", "--model", MODEL, "--prompt-file", TEXT, "--out", out, says=["8192"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
