"""llama.cpp as an engine: the program `pbsattn prefill`, once for each item, on the CPU."""

import json
import pathlib
import subprocess
import tempfile

from . import kind
from .answers import Answer, Score, Texts
from .attentions import Attention

_LOGITS = 1 << 29  # that may be kept: 2 GB of float32
_REFUSED = ("prompt of", "--positions")  # how messages begin that are about the prompt, not about the model or the machine


class LlamaEngine(Texts):
    """A GGUF model. Prompts are of the model's own length at most; what the program leaves to ggml isn't counted."""

    name = "llama"
    FULL = Attention.parse("full")

    def __init__(self, model, program):
        import transformers

        path = pathlib.Path(model)
        if not path.is_file():
            raise ValueError(f"model {model}: no such file; the engine llama takes a GGUF file")
        self.model, self.program = str(path), program
        try:
            subprocess.run([program, "--version"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            raise ValueError(
                f"program {program}: can't be run; `./dev build` makes build/release/apps/pbsattn/pbsattn, "
                "which --program names"
            ) from None
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def scorer(self, ids, judged, attentions):
        """A function from an attention to its Score. All of `attentions` run in one process, full before them."""
        names = list(dict.fromkeys(["full", *self._known(attentions)]))
        most = _LOGITS // len(self.tokenizer)
        made = self._run(ids, names, "--generate", 0, "--each", "--positions", "all" if len(ids) <= most else most)

        def score(attention):
            run = self._taken(made, attention)
            each = run["each"]
            start = len(ids) - 1 - judged  # the first position that predicts a judged token
            at = [i for i, position in enumerate(each["position"]) if position >= start]

            def pick(name, default):
                return [float(each[name][i]) if each[name] else default for i in at]

            return Score(
                [each["position"][i] - start for i in at],
                pick("nll", 0.0),
                pick("kl", 0.0),
                pick("same_top1", 1.0),
                run["density"]["mean"],
                [layer["density"] for layer in run["layers"]],
                run["first_token_seconds"],
            )

        return score

    def answers(self, ids, attentions, max_new_tokens) -> dict:
        """Continues a prompt greedily: {attention's name: Answer, or Unsupported}."""
        answers: dict[str, Answer | kind.Unsupported] = {}
        try:
            made = self._run(ids, self._known(attentions), "--generate", max_new_tokens, "--positions", 1)
        except kind.Unsupported as reason:
            return {attention.name: reason for attention in attentions}
        for attention in attentions:
            try:
                run = self._taken(made, attention)
                tokens = run["continuation"]["tokens"]
                answers[attention.name] = Answer(
                    self.decode(tokens), tokens, run["density"]["mean"], run["first_token_seconds"]
                )
            except kind.Unsupported as reason:
                answers[attention.name] = reason
        return answers

    @staticmethod
    def _known(attentions):
        """Names of those that the program has."""
        return [attention.name for attention in attentions if attention.method is not None]

    @staticmethod
    def _taken(made, attention):
        """The run of an attention. Raises Unsupported if there is none, or if it wasn't pbsattn's."""
        if attention.method is None:
            raise kind.Unsupported(f"{attention.name} is PyTorch's; llama.cpp hasn't got it")
        if made["left_to_ggml"]:
            raise kind.Unsupported(f"some attention was left to ggml: {made['left_to_ggml']}")
        return next(run for run in made["runs"] if run["name"] == attention.name)

    def _run(self, ids, names, *options):
        """The program's JSON for one prompt."""
        if not names:
            raise kind.Unsupported("no attention that llama.cpp has")
        with tempfile.NamedTemporaryFile("w", suffix=".ids") as prompt:
            prompt.write(" ".join(map(str, ids)))
            prompt.flush()
            command = [
                self.program,
                "prefill",
                "--model",
                self.model,
                "--prompt-file",
                prompt.name,
                "--token-ids",
                "--json",
                "--method",
                names[-1],
                "--compare",
                ",".join(names[:-1]) or "none",
                *map(str, options),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode in (130, -2):
            raise KeyboardInterrupt
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1].removeprefix("pbsattn: ")
            if said.startswith(_REFUSED):
                raise kind.Unsupported(said)
            raise RuntimeError(f"{self.program}: {said}")
        return json.loads(done.stdout)
