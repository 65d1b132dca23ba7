#!/usr/bin/env python3
"""Tests of how the tools end, and of how they write files: on a closed pipe, a full disk, SIGTERM, and through a link."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

TOOLS = pathlib.Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_prefill  # noqa: E402
import common  # noqa: E402


class Programs(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def environment(self, **more):
        return {**os.environ, "XDG_CACHE_HOME": str(self.folder), **more}

    def test_reader_that_has_enough(self):
        for unbuffered in ("", "1"):
            for arguments in (["list"], ["--help"]):
                read, write = os.pipe()
                os.close(read)
                run = subprocess.run(
                    [sys.executable, TOOLS / "models.py", *arguments],
                    stdout=write,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=self.environment(PYTHONUNBUFFERED=unbuffered),
                )
                os.close(write)
                self.assertEqual(run.stderr, "")
                if not (unbuffered and arguments == ["--help"]):  # whose writes argparse doesn't look after
                    self.assertEqual(run.returncode, 128 + signal.SIGPIPE)

    def test_full_standard_output(self):
        for unbuffered in ("", "1"):
            with open("/dev/full", "w") as full:
                run = subprocess.run(
                    [sys.executable, TOOLS / "models.py", "list"],
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=self.environment(PYTHONUNBUFFERED=unbuffered),
                )
            self.assertEqual(run.returncode, 1)
            self.assertRegex(run.stderr, r"\A[^\n]*standard output[^\n]*\n\Z")

    def test_closed_standard_output(self):
        run = subprocess.run(
            ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, TOOLS / "models.py", "list"],
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )
        self.assertEqual(run.returncode, 1)
        self.assertRegex(run.stderr, r"\A[^\n]*standard output: it is closed[^\n]*\n\Z")

    def wait_for(self, path):
        for _ in range(600):
            if path.exists():
                return
            time.sleep(0.1)
        self.fail(f"{path} didn't come")

    def test_sigterm_ends_children_and_cleans_up(self):
        """A tool whose child has a child of its own, as cmake has compilers, is ended by a signal to it alone."""
        script = self.folder / "tool.py"
        script.write_text(f"""
import os, pathlib, sys, tempfile
sys.path.insert(0, {str(TOOLS)!r})
import common

def main():
    with tempfile.TemporaryDirectory(dir={str(self.folder)!r}, prefix="left-") as folder:
        waits = "sh -c 'sleep 1; echo $$ > pid.partial; mv pid.partial pid; sleep 600; :'; :"
        common.run_child(["sh", "-c", waits], cwd={str(self.folder)!r})

common.run_main(main)
""")
        for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            (self.folder / "pid").unlink(missing_ok=True)
            tool = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
            self.wait_for(self.folder / "pid")
            grandchild = int((self.folder / "pid").read_text())
            tool.send_signal(number)
            said = tool.communicate(timeout=60)[1]
            self.assertEqual(tool.returncode, status)
            self.assertRegex(said, r"\A[^\n]*interrupted; run it again to go on\n\Z")
            self.assertEqual(list(self.folder.glob("left-*")), [])
            for _ in range(100):  # it was told before the tool ended, and needs a moment
                if (
                    not pathlib.Path(f"/proc/{grandchild}").exists()
                    or pathlib.Path(f"/proc/{grandchild}/stat").read_text().split()[2] == "Z"
                ):
                    break
                time.sleep(0.1)
            else:
                self.fail("the child's child goes on")

    def test_files_are_written_through_links(self):
        target, link, dangling = self.folder / "target.json", self.folder / "link.json", self.folder / "dangling.json"
        target.write_text("old")
        link.symlink_to("target.json")
        dangling.symlink_to("made.json")
        for path in (link, dangling):
            bench_prefill.write_records([], str(path))
            self.assertTrue(path.is_symlink())
        self.assertEqual(target.read_text(), "[]\n")
        self.assertEqual((self.folder / "made.json").read_text(), "[]\n")
        bench_prefill.write_records([], os.devnull)
        self.assertTrue(pathlib.Path(os.devnull).is_char_device())
        self.assertEqual(list(self.folder.glob("*partial*")), [])

    def test_standard_output_by_its_name(self):
        """Of a pipe: what /dev/stdout leads to then is no path."""
        code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import common; common.write_whole('/dev/stdout', 'text')"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual((run.returncode, run.stdout), (0, "text"), run.stderr)

    def test_the_file_that_is_standard_output(self):
        target = self.folder / "target.json"
        code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import common; common.write_whole({str(target)!r}, 'text')"
        with open(target, "w", encoding="utf-8") as out:
            out.write("table")
            out.flush()
            run = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True)
        self.assertIn("is standard output", run.stderr)
        self.assertEqual(target.read_text(), "table")

    def test_a_file_that_cannot_be_written_leaves_the_old_one(self):
        target = self.folder / "target.json"
        target.write_text("old")
        with self.assertRaises(TypeError):
            common.write_whole(target, None)
        self.assertEqual(target.read_text(), "old")
        self.assertEqual(list(self.folder.glob("*partial*")), [])

    def test_parts_of_a_text_make_the_whole(self):
        def made(*options):
            told = subprocess.check_output(
                [TOOLS / "text.py", "manual", *options], text=True, env=self.environment(), encoding="utf-8"
            )
            return pathlib.Path(told.strip()).read_text(encoding="utf-8")

        whole = made("--bytes", "9000")
        self.assertEqual(made("--bytes", "5000") + made("--skip", "5000", "--bytes", "4000"), whole)
        beyond = subprocess.run(
            [TOOLS / "text.py", "manual", "--skip", "9" * 9], capture_output=True, text=True, env=self.environment()
        )
        self.assertEqual(beyond.returncode, 1)
        self.assertIn(f"--skip {'9' * 9}: the text manual has", beyond.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
