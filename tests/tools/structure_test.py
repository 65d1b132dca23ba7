#!/usr/bin/env python3
"""Tests of the tree: folders and files stay small enough to read, and includes point the way docs tell."""

import pathlib
import re
import tempfile
import unittest

ROOT = pathlib.Path(__file__).parents[2]
MOST_ENTRIES = 16  # of a folder under src/
MOST_LINES = 400
SOURCES = {".h", ".hpp", ".c", ".cc", ".cu", ".cuh"}
BACKENDS = ("cpu", "cuda", "reference")
STAGES = ("permute", "select", "attend")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def files_below(folder, endings):
    """Files with those endings below a folder, if there is one, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())


def crowded_folders(root):
    """Complaints about folders under src/ with more than MOST_ENTRIES entries."""
    src = root / "src"
    counts = {folder: len(list(folder.iterdir())) for folder in (src, *src.rglob("*")) if folder.is_dir()}
    return [
        f"{folder.relative_to(root)}: {count} entries, over {MOST_ENTRIES}; give some of them a folder"
        for folder, count in sorted(counts.items())
        if count > MOST_ENTRIES
    ]


def long_files(root):
    """Complaints about source files of MOST_LINES lines or more."""
    complaints = []
    for top in ("src", "include", "integrations", "apps"):
        for path in files_below(root / top, SOURCES | {".py"}):
            lines = path.read_text().count("\n")
            if lines >= MOST_LINES:
                complaints.append(f"{path.relative_to(root)}: {lines} lines, not under {MOST_LINES}; cut it")
    return complaints


def room_of(parts):
    """What a path below src/ belongs to: its top folder, and in a backend its stage or what folder its stages share."""
    top = parts[0]
    return top, parts[1] if top in BACKENDS and len(parts) > 2 else None


def may_include(parts, included):
    """Whether the file `parts` of src/ may include the file `included` of src/, both as tuples of a path's parts."""
    top, room = room_of(parts)
    other_top, other_room = room_of(included)
    if top in BACKENDS and other_top == top:
        if other_room not in STAGES or room in (other_room, None):
            return True
        # A stage sees another's own header; what stages share sees none of them.
        return room in STAGES and pathlib.PurePath(included[-1]).stem == other_room and len(included) == 3
    return other_top not in BACKENDS or top == other_top


def wrong_includes(root):
    """Complaints about includes that go past a stage's header, or to a backend from another, from core or from outside."""
    src = root / "src"
    complaints = []
    for top in ("src", "include", "integrations", "apps", "examples"):
        for path in files_below(root / top, SOURCES):
            for name in INCLUDE.findall(path.read_text()):
                if not (src / name).is_file():
                    continue
                parts = path.relative_to(src if top == "src" else root).parts
                if not may_include(parts, pathlib.PurePosixPath(name).parts):
                    complaints.append(f"{path.relative_to(root)}: includes {name}, which is none of its business")
    return complaints


class Tree(unittest.TestCase):
    def test_folders_have_few_entries(self):
        self.assertEqual(crowded_folders(ROOT), [])

    def test_files_are_short(self):
        self.assertEqual(long_files(ROOT), [])

    def test_includes_point_one_way(self):
        self.assertEqual(wrong_includes(ROOT), [])

    def test_backends_have_the_same_rooms(self):
        for backend in BACKENDS:
            for stage in STAGES:
                folder = ROOT / "src" / backend / stage
                self.assertTrue((folder / f"{stage}.h").is_file(), folder)


class MadeUpTree(unittest.TestCase):
    """That the tests above can fail."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        for path in (
            "core/plan.h",
            "cpu/context.h",
            "cpu/kernels/kernels.h",
            "cpu/select/select.h",
            "cpu/select/scores/means.h",
            "cpu/attend/attend.h",
            "cuda/select/select.h",
            "reference/numbers.h",
        ):
            self.write(f"src/{path}")

    def write(self, path, *includes):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f'#include "{name}"\n' for name in includes) or "int x;\n")

    def complaints(self, path, *includes):
        """The names that the file, with these includes, may not include."""
        self.write(path, *includes)
        return [re.search(r"includes (\S+),", complaint).group(1) for complaint in wrong_includes(self.root)]

    def test_folders_are_counted(self):
        for i in range(MOST_ENTRIES):
            self.write(f"src/core/{i}/x.h")
        self.assertEqual([complaint.split(":")[0] for complaint in crowded_folders(self.root)], ["src/core"])

    def test_lines_are_counted(self):
        for path in ("apps/a.cc", "integrations/python/b.py", "include/c.h", "src/cpu/d.cc"):
            self.write(path, *["x.h"] * MOST_LINES)
        self.write("apps/shorter.cc", *["x.h"] * (MOST_LINES - 1))
        self.assertEqual(
            [complaint.split(":")[0] for complaint in long_files(self.root)],
            ["src/cpu/d.cc", "include/c.h", "integrations/python/b.py", "apps/a.cc"],
        )

    def test_a_stage_sees_anothers_header_alone(self):
        self.assertEqual(
            self.complaints(
                "src/cpu/attend/x.cc",
                "cpu/select/select.h",
                "cpu/select/scores/means.h",
                "cpu/attend/attend.h",
                "cpu/context.h",
                "cpu/kernels/kernels.h",
                "core/plan.h",
            ),
            ["cpu/select/scores/means.h"],
        )

    def test_a_stage_sees_its_own_insides(self):
        self.assertEqual(self.complaints("src/cpu/select/x.cc", "cpu/select/scores/means.h", "cpu/select/select.h"), [])

    def test_what_stages_share_sees_none(self):
        self.assertEqual(
            self.complaints("src/cpu/kernels/x.cc", "cpu/select/select.h", "cpu/context.h"), ["cpu/select/select.h"]
        )

    def test_backends_and_core_see_no_backend(self):
        self.assertEqual(
            self.complaints("src/cpu/x.cc", "cuda/select/select.h", "reference/numbers.h", "cpu/context.h"),
            ["cuda/select/select.h", "reference/numbers.h"],
        )
        self.write("src/cpu/x.cc")
        self.assertEqual(self.complaints("src/core/x.cc", "cpu/context.h", "core/plan.h"), ["cpu/context.h"])

    def test_what_lies_outside_sees_no_backend(self):
        self.assertEqual(
            self.complaints("integrations/ggml/x.cc", "core/plan.h", "cpu/context.h", "stdio.h"), ["cpu/context.h"]
        )


if __name__ == "__main__":
    unittest.main(verbosity=2)
