"""Tests of app_test.py: what the program does with a model."""

import json
import math
import re
import signal
import subprocess
import time
import xml.etree.ElementTree

from app_cases import MASK, MODEL, PREFILL, PROGRAM, PROGRESS, Case, needs_model, pbsattn


@needs_model
class Prefill(Case):
    def refused_prefill(self, status, *arguments, says):
        self.refused(status, *PREFILL, *arguments, says=says)

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
        result = pbsattn(*PREFILL, *"--tokens 1500 --generate 4 --positions 40 --method pbs --top-p 0.5 --json".split(), out)
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

    def test_micro_batches(self):
        # Full attention is the same however it is cut; two-step at a threshold of 0 keeps every block of every chunk.
        arguments = (
            "--tokens 2100 --generate 4 --positions 20 --compare full,two-step:threshold=0 --method two-step --json".split()
        )
        whole, cut = (json.loads(pbsattn(*PREFILL, *arguments, "-", "--ubatch", ubatch).stdout) for ubatch in (0, 600))
        self.assertEqual((whole["prompt"]["ubatch"], cut["prompt"]["ubatch"]), (2100, 600))
        for name, run in zip(("full", "two-step:threshold=0"), cut["runs"]):
            self.assertEqual(run["name"], name)
            self.assertEqual(run["density"]["mean"], 1)
        self.assertLess(cut["runs"][1]["kl_mean"], 1e-3)
        self.assertLess(cut["runs"][2]["density"]["mean"], 1)

    def test_a_learned_order(self):
        file = self.learned(30, 9, 3, 64, settings='{"4": {"*": {"keep": "all"}}}')
        result = pbsattn(
            *PREFILL,
            *"--tokens 800 --generate 0 --compare none --positions 1 --threshold 0.2 --fallback never".split(),
            *("--json", "--learned"),
            file,
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        (run,) = json.loads(result.stdout)["runs"]
        self.assertEqual((run["name"], run["options"]["permutation"]), ("auto", "learned"))
        densities = [layer["density"] for layer in run["layers"]]
        self.assertEqual([layer for layer, density in enumerate(densities) if density == 1], [4])
        picture = self.folder / "mask.svg"
        result = pbsattn(*MASK, *"--tokens 800 --layer 2 --head 4 --threshold 0.2 --learned".split(), file, "--out", picture)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("a learned order", picture.read_text())
        for sizes, says in (
            ((24, 9, 3, 64), "with 24 layers, the model has 30"),
            ((30, 9, 9, 64), "with 9 KV heads, the model has 3"),
            ((30, 9, 3, 128), "with 128 numbers in a head, the model has 64"),
        ):
            self.refused_prefill(1, "--tokens", 300, "--learned", self.learned(*sizes), says=["tiny.pbs", says])

    def test_json_on_the_standard_output_and_one_run(self):
        result = pbsattn(*PREFILL, *"--tokens 300 --generate 0 --compare none --method ggml --positions all --json".split())
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        report = json.loads(result.stdout)
        self.assertEqual([run["name"] for run in report["runs"]], ["ggml"])
        self.assertEqual(report["positions"], 300)
        self.assertNotIn("each", report["runs"][0])

    def test_tokens_by_number_and_every_position(self):
        ids = self.file("prompt.ids", " ".join(str(100 + i % 90) for i in range(600)).encode())
        result = pbsattn(
            *PREFILL[:-1],
            ids,
            *"--token-ids --generate 0 --compare full --method pbs:top_p=0.3 --positions all --each --json".split(),
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
            *PREFILL,
            *"--tokens 700 --generate 0 --compare full,pbs:top_p=0.5:segment=128 --method pbs --top-p 1 --json".split(),
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
                    [PROGRAM, *PREFILL, "--tokens", "8000", "--json", str(out)],
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
        result = pbsattn(*MASK, *"--tokens 1200 --layer 2 --head 3 --permutation last_queries --out".split(), out)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        svg = xml.etree.ElementTree.fromstring(out.read_text())
        kept = [path for path in svg.iter("{http://www.w3.org/2000/svg}path") if path.get("class") == "kept"]
        self.assertEqual(len(kept), 2)
        # Two pictures of one head that differ: the second has its keys permuted.
        first, second = (path.get("d").count("M") for path in kept)
        self.assertGreaterEqual(min(first, second), 10)
        before, after = map(float, re.findall(r"density (\S+) before .*, (\S+) after", result.stdout)[0])
        self.assertLess(after, before)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["mask.svg"])

    def test_refusals(self):
        base = (*MASK, "--tokens", 600)
        out = self.folder / "mask.svg"
        self.refused(2, *base, "--out", out, "--layer", 30, says=["--layer 30", "0 to 29"])
        self.refused(2, *base, "--out", out, "--head", -1, says=["--head -1", "0 to 8"])
        self.refused(1, *base, "--out", "/no/such/folder/mask.svg", says=["output file"])
        self.refused(1, *MASK, "--out", out, says=["8192"])
