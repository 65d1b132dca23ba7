"""What runs the models. An engine turns text into tokens, scores a text, and answers a prompt, under an attention."""

import dataclasses
import hashlib
import pathlib
import time
import warnings

import torch
import transformers

import pbsattn
import pbsattn.transformers

from . import decode, kind, models
from .answers import Answer, Score, Texts
from .attentions import Attention

_HEAD_ROWS = 1024  # positions that go through the output layer at a time: 152K logits each are 0.6 GB
_CACHED_TOKENS = 1 << 18  # whose caches are kept at a time: 7.5 GB under a 1.5B model; on a GPU as many as have room in
_SHARE = 1 / 6  # of its memory, where that is more


def options_of(attention):
    """Every option of a method with its value, so that a run's folder says what a name stood for; {} for PyTorch's own."""
    if attention.method is None:
        return {}
    settings = dict(attention.settings)
    if "settings" in settings:
        settings["settings"] = pbsattn.transformers.read_settings(settings["settings"])
    if "learned" in settings:
        settings["learned"] = hashlib.sha256(pathlib.Path(settings["learned"]).read_bytes()).hexdigest()[:16]
    of_prompt = {name: value for name in ("chunk", "cache") if (value := getattr(attention, name)) is not None}
    return {**settings, **of_prompt, **pbsattn.options(attention.method)}


def versions():
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
        return dataclasses.replace(attention, settings=settings).on(self.model, stats=True)

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
        with self.attend(attention), _quiet():
            start = time.perf_counter()
            outs = attention.run(self.model.model, self.tensor([ids]), use_cache=False)
            hidden = torch.cat([out.last_hidden_state[0] for out in outs])
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

    @property
    def _cached_tokens(self):
        """Tokens whose caches are kept at a time."""
        if self.device.type != "cuda":
            return _CACHED_TOKENS
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 2 * self.layers * config.num_key_value_heads * head_dim * self.model.dtype.itemsize
        return max(int(_SHARE * torch.cuda.get_device_properties(self.device).total_memory / each), _CACHED_TOKENS)

    @property
    def room(self):
        """Tokens of prompts that are worth answering together: fewer than have room, as caches of a batch are equally long.
        0 on the CPU, where a prompt's answer is kept as soon as it can be."""
        together = self.device.type != "cpu" and decode.whole_caches(self.model)
        return self._cached_tokens * 3 // 4 if together else 0

    def answers(self, ids, attentions, max_new_tokens) -> dict:
        """Continues a prompt greedily until the model ends its turn: {attention's name: Answer, or Unsupported}."""
        return self.answers_to([(ids, attentions, max_new_tokens)])[0]

    @torch.no_grad()
    def answers_to(self, asked) -> list[dict]:
        """What answers() gives, for each (ids, attentions, max_new_tokens) of a list.

        A prompt goes through the model once for each attention. What is decoded goes through SDPA, in batches over prompts
        and attentions, since a step of many sequences takes hardly longer than that of one: of so many as have room for
        their caches, and of one prompt alone where layers don't cache all of it.
        """
        made: list[dict[str, Answer | kind.Unsupported]] = [{} for _ in asked]
        left = [(which, attention) for which, (_, attentions, _) in enumerate(asked) for attention in attentions]
        whole, native = decode.whole_caches(self.model), models.native_length(self.model)

        def size(one):
            ids, _, most = asked[one[0]]
            return len(ids) + most

        def alike(one):  # what a batch has in common
            return (size(one) > native, None if whole else one[0])

        left.sort(key=lambda one: (*alike(one)[:1], -asked[one[0]][2]))
        while left:
            batch, width = [left[0]], size(left[0])
            for one in left[1:]:
                width = max(width, size(one))
                if alike(one) != alike(left[0]) or (len(batch) + 1) * width > self._cached_tokens:
                    break
                batch.append(one)
            left = left[len(batch) :]
            self.stretch(max(map(size, batch)))
            self._answer(batch, asked, made, max(map(size, batch)) if whole else None)
        return made

    def _answer(self, batch, asked, made, width):
        """Puts the answers of a batch of (prompt, attention) into `made`. width: of the caches; None: they are joined."""
        caches = decode.Joined() if width is None else decode.Caches(len(batch), width)
        first, answered, most = [], [], []
        for which, attention in batch:
            ids, _, limit = asked[which]
            start = time.perf_counter()
            try:
                with self.attend(attention), _quiet():
                    out = attention.run(self.model, self.tensor([ids]), use_cache=True, logits_to_keep=1)[-1]
                    token = out.logits[0, -1].argmax()
                    self.wait()
                    seconds = time.perf_counter() - start
                    layers = self.densities(attention)
            except (kind.Unsupported, NotImplementedError) as reason:
                made[which][attention.name] = kind.Unsupported(str(reason))
                continue
            answer = made[which][attention.name] = Answer("", [], sum(layers) / len(layers), seconds)
            caches.add(out.past_key_values)
            first.append(token)
            answered.append(answer)
            most.append(limit)
            del out
        if answered:
            tokens = decode.decode(self.model, caches, torch.stack(first), most, self.tensor(self._ends()))
            for answer, answer.tokens in zip(answered, tokens):
                answer.text = self.decode(answer.tokens)

    def _ends(self):
        """Tokens that end an answer."""
        configured = self.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        ends = [end for end in (*ends, self.tokenizer.eos_token_id) if end is not None]
        return list(dict.fromkeys(ends)) or [0]

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _quiet(warnings.catch_warnings):
    """Without warnings of what pbsattn leaves to others: densities() tells it."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore", pbsattn.transformers.FallbackWarning)
