"""What runs the models. An engine turns text into tokens, scores a text, and answers a prompt, under an attention."""

import dataclasses
import hashlib
import pathlib
import time
import warnings

import torch

import pbsattn
import pbsattn.transformers

from . import kind, models
from .answers import Answer, Score, Texts
from .attentions import Attention

_HEAD_ROWS = 1024  # positions that go through the output layer at a time: 152K logits each are 0.6 GB
_CACHED_TOKENS = 1 << 18  # of prompts whose caches are kept at a time: 7.5 GB under a 1.5B model


def options_of(attention):
    """Every option of a method with its value, so that a run's folder says what a name stood for; {} for PyTorch's own."""
    if attention.method is None:
        return {}
    settings = dict(attention.settings)
    if "settings" in settings:
        settings["settings"] = pbsattn.transformers.read_settings(settings["settings"])
    if "learned" in settings:
        settings["learned"] = hashlib.sha256(pathlib.Path(settings["learned"]).read_bytes()).hexdigest()[:16]
    return {**settings, **pbsattn.options(attention.method)}


def versions():
    import transformers

    return {"pbsattn": pbsattn.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return pbsattn.describe_cpu().processor


def fill_in(given):
    """Puts in the defaults that depend on the machine."""
    if given.device is None:
        given.device = "cuda" if given.engine == "transformers" and torch.cuda.is_available() else "cpu"
    if given.dtype is None:
        given.dtype = "float32" if torch.device(given.device).type == "cpu" else "bfloat16"


def make(given, say):
    if given.engine == "llama":
        from .llama import LlamaEngine

        return LlamaEngine(given.model, given.program)
    say(f"loading {given.model}")
    model, tokenizer = models.load(given.model, torch.device(given.device), getattr(torch, given.dtype))
    return Engine(model, tokenizer, given.yarn)


@dataclasses.dataclass
class Prefill:
    """What one prefill under an attention did."""

    hidden: torch.Tensor  # [tokens, width]: what goes into the output layer
    density: float
    layers: list[float]  # density of each layer
    seconds: float


class Engine(Texts):
    """A transformers model, on the CPU or a GPU.

    A prompt goes in whole under the attention given, however short; what is decoded then goes through PyTorch's SDPA.
    """

    name = "transformers"
    FULL = Attention.parse("full")

    def __init__(self, model, tokenizer, yarn=4.0):
        self.model = model
        self.tokenizer = tokenizer
        self.yarn = yarn
        self.device = next(model.parameters()).device

    def tensor(self, ids):
        return torch.tensor(ids, device=self.device)

    def attend(self, attention):
        """The model under an attention, for a `with` block. Short prompts are pbsattn's here, too."""
        if attention.method is None:
            return attention.on(self.model)
        settings = {"min_tokens": 2, **attention.settings}
        return Attention(attention.name, attention.method, settings).on(self.model, stats=True)

    def stretch(self, tokens):
        """Positions by YaRN where a prompt is longer than the model's own length, and as trained where it isn't."""
        models.set_yarn(self.model, self.yarn if tokens > models.native_length(self.model) else 1)

    def densities(self, attention):
        """Density of each layer of the last prefill, under attend(). Raises Unsupported where a layer fell back."""
        if attention.method is None:
            return [1.0] * self.layers
        stats = pbsattn.transformers.stats(self.model)
        left = next((each for each in stats if each.left), None)
        if left is not None:
            raise kind.Unsupported(f"layer {left.layer} went to SDPA or eager attention: {left.reason}")
        return [each.density for each in stats]

    @torch.no_grad()
    def prefill(self, ids, attention) -> Prefill:
        """Runs a prompt, a list of tokens, through the model."""
        self.stretch(len(ids))
        ids = self.tensor([ids])
        with self.attend(attention), _quiet():
            start = time.perf_counter()
            hidden = self.model.model(ids, use_cache=False).last_hidden_state[0]
            self.wait()
            seconds = time.perf_counter() - start
            layers = self.densities(attention)
        return Prefill(hidden, sum(layers) / len(layers), layers, seconds)

    @property
    def layers(self):
        return self.model.config.num_hidden_layers

    @property
    def rope_pairs(self):
        """Which columns of a key RoPE turns together: see pbsattn.transformers.rope_pairs."""
        return pbsattn.transformers.rope_pairs(next(each for each in self.model.modules() if hasattr(each, "layer_idx")))

    def capture(self, ids, layers):
        """Queries, keys, values and scale of some layers' attention: see models.capture."""
        self.stretch(len(ids))
        return models.capture(self.model, self.tensor([ids]), layers)

    def each_layer(self, ids, visit):
        """Calls visit() with each layer's queries, keys, values and scale: see models.each_layer. Raises ValueError where a
        layer isn't a causal softmax alone."""
        self.stretch(len(ids))
        models.each_layer(self.model, self.tensor([ids]), visit, causal=True)

    def logits(self, hidden):
        """Of each position of `hidden`, [positions, vocabulary], float32."""
        config = self.model.config
        if getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_scaling", 1) != 1:
            raise kind.Unsupported(f"{type(self.model).__name__} changes its logits after the output layer")
        return self.model.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def losses(self, hidden, targets, reference=None):
        """Of each position: -log of the target's probability; with another run's `reference` hidden states also
        KL(reference || run) in nats and whether the most likely tokens are the same. float32 [positions], on the CPU.

        The logits of both are made some rows at a time, because those of all positions would fill a GPU.
        """
        nll, divergence, same = [], [], []
        for at in range(0, len(targets), _HEAD_ROWS):
            rows = slice(at, at + _HEAD_ROWS)
            log_q = self.logits(hidden[rows]).log_softmax(-1)
            nll.append(-log_q.gather(1, targets[rows, None])[:, 0])
            if reference is not None:
                log_p = self.logits(reference[rows]).log_softmax(-1)
                same.append(log_p.argmax(-1) == log_q.argmax(-1))
                divergence.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_(min=0))

        def join(parts):
            return torch.cat(parts).float().cpu() if parts else None

        return join(nll), join(divergence), join(same)

    def scorer(self, ids, judged, attentions):
        """A function from an attention to its Score of a document's last `judged` tokens.

        It keeps full attention's last hidden states, of which its logits are made again where they are needed.
        """
        full = self.prefill(ids, self.FULL)
        reference = full.hidden[-judged - 1 : -1].clone()

        def score(attention):
            run = full if attention == self.FULL else self.prefill(ids, attention)
            return self._score(ids, judged, run, reference)

        return score

    def score(self, ids, judged, attention) -> Score:
        """The likelihood alone of a document's last `judged` tokens."""
        return self._score(ids, judged, self.prefill(ids, attention))

    def _score(self, ids, judged, run, reference=None):
        parts = self.losses(run.hidden[-judged - 1 : -1], self.tensor(ids[-judged:]), reference)
        kl, same = (None if part is None else part.tolist() for part in parts[1:])
        return Score(list(range(judged)), parts[0].tolist(), kl, same, run.density, run.layers, run.seconds)

    @torch.no_grad()
    def answers(self, ids, attentions, max_new_tokens) -> dict:
        """Continues a prompt greedily until the model ends its turn: {attention's name: Answer, or Unsupported}.

        The prompt goes through the model once for each attention. What is decoded goes through SDPA, for several attentions
        as one batch, since a step of a few sequences takes hardly longer than that of one; for so many as have room for
        their caches.
        """
        self.stretch(len(ids) + max_new_tokens)
        prompt = self.tensor([ids])
        together = max(_CACHED_TOKENS // len(ids), 1)
        made = {}
        for at in range(0, len(attentions), together):
            made |= self._answers(prompt, attentions[at : at + together], max_new_tokens)
        return made

    def _answers(self, prompt, attentions, max_new_tokens):
        made: dict[str, Answer | kind.Unsupported] = {}
        caches, first = [], []
        for attention in attentions:
            start = time.perf_counter()
            try:
                with self.attend(attention), _quiet():
                    out = self.model(prompt, use_cache=True, logits_to_keep=1)
                    token = out.logits[0, -1].argmax()
                    self.wait()
                    seconds = time.perf_counter() - start
                    layers = self.densities(attention)
            except (kind.Unsupported, NotImplementedError) as reason:
                made[attention.name] = kind.Unsupported(str(reason))
                continue
            made[attention.name] = Answer("", [], sum(layers) / len(layers), seconds)
            caches.append(out.past_key_values)
            first.append(token)
            del out
        answered = [each for each in made.values() if isinstance(each, Answer)]
        if answered:
            for answer, tokens in zip(answered, self._decode(_joined(caches), torch.stack(first), max_new_tokens)):
                answer.text, answer.tokens = self.decode(tokens), tokens
        return made

    def _decode(self, cache, first, most):
        """Tokens of each sequence of a cache from its first new one on, up to one that ends an answer."""
        ends = self.tensor(self._ends())
        steps, ended = [first], torch.isin(first, ends)
        while len(steps) < most and not bool(ended.all()):
            steps.append(self.model(steps[-1][:, None], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1))
            ended |= torch.isin(steps[-1], ends)
        end = set(ends.tolist())
        for tokens in torch.stack(steps, 1).tolist():
            yield tokens[: next((i for i, token in enumerate(tokens) if token in end), most)]

    def _ends(self):
        """Tokens that end an answer."""
        configured = self.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        ends = [end for end in (*ends, self.tokenizer.eos_token_id) if end is not None]
        return list(dict.fromkeys(ends)) or [0]

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _joined(caches):
    """The first of several equally long caches, with the sequences of all; the others are spent."""
    first, *others = caches
    for i, layer in enumerate(first.layers):
        layer.keys = torch.cat([layer.keys, *(other.layers[i].keys for other in others)])
        layer.values = torch.cat([layer.values, *(other.layers[i].values for other in others)])
        for other in others:  # layer by layer, so that no two copies of everything are in memory
            other.layers[i].keys = other.layers[i].values = None
    return first


class _quiet(warnings.catch_warnings):
    """Without warnings of what pbsattn leaves to others: densities() tells it."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore", pbsattn.transformers.FallbackWarning)
