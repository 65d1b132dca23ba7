"""Tests of app_test.py: what the program reads and writes."""

import json
import os
import pathlib
import signal
import subprocess
import unittest

from app_cases import BRIEF, MASK, MODEL, PROGRAM, PROGRESS, TEXT, Case, needs_model, pbsattn


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
                (*MASK, *"--tokens 257 --threads 1 --out".split(), self.folder / "mask.svg"),
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
