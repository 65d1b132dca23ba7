"""Greedy decoding of prompts of several lengths as one batch."""

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from . import kind, models

_NAME = "pbsattn_eval_decode"  # among transformers' attentions
_WIDTH = 64  # tokens that a cache's length is a multiple of, so that kernels need no padded mask
# The others refuse masks, or plan anew for each batch.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def whole_caches(model):
    """Returns whether every layer of a model caches all keys and values, and so can be one of Caches."""
    layers = transformers.DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


class Caches(transformers.Cache):
    """Keys and values of several prompts, a row each, from the first token on; a row's next token goes behind its last."""

    attention = _NAME

    def __init__(self, rows, tokens):
        """tokens: of the longest row, with what is decoded."""
        super().__init__(layers=[DynamicLayer()])  # it has to have some; `keys` and `values` are what counts
        self.rows, self.width = rows, -(-tokens // _WIDTH) * _WIDTH
        self.keys, self.values, self.lengths = [], [], []
        self.live = rows  # the first rows, which are decoded

    def add(self, prefilled):
        """Puts a prompt's cache into the next row."""
        row = len(self.lengths)
        for i, layer in enumerate(prefilled.layers):
            if row == 0:
                heads, tokens, head_dim = layer.keys.shape[1:]
                for made in (self.keys, self.values):
                    made.append(layer.keys.new_zeros(self.rows, heads, self.width, head_dim))
            tokens = layer.keys.shape[2]
            self.keys[i][row, :, :tokens] = layer.keys[0]
            self.values[i][row, :, :tokens] = layer.values[0]
        self.lengths.append(tokens)

    def start(self):
        """Returns the cache to decode with, now that all rows are in."""
        first = self.keys[0]
        self.at = torch.tensor(self.lengths, device=first.device)
        self.row = torch.arange(len(self.lengths), device=first.device)
        seen = torch.arange(self.width, device=first.device) < self.at[:, None]
        self.mask = torch.zeros_like(seen, dtype=first.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]
        return self

    def step(self, live):
        """Makes room for one more token in each of the first `live` rows. Returns its positions and the mask."""
        self.live = live
        positions = self.at[:live].clone()
        self.mask[self.row[:live], 0, 0, positions] = 0
        self.at[:live] += 1
        return positions[:, None], self.mask[:live]

    def update(self, keys, values, layer, *args, **kwargs):
        made = self.keys[layer][: self.live], self.values[layer][: self.live]
        for cached, new in zip(made, (keys, values)):
            cached[self.row[: self.live], :, self.at[: self.live] - 1] = new[:, :, 0]
        return made

    def get_seq_length(self, layer_idx=0):
        return self.width


class Joined:
    """The caches of one prompt under several attentions, of whatever layers a model has."""

    attention = "sdpa"

    def __init__(self):
        self.caches = []

    def add(self, prefilled):
        """Takes the next cache, which is spent then."""
        self.caches.append(prefilled)

    def start(self):
        """Returns the cache to decode with, now that all are there."""
        first, *others = self.caches
        for i, layer in enumerate(first.layers):
            layer.keys = torch.cat([layer.keys, *(other.layers[i].keys for other in others)])
            layer.values = torch.cat([layer.values, *(other.layers[i].values for other in others)])
            for other in others:  # layer by layer, so that no two copies of everything are in memory
                other.layers[i].keys = other.layers[i].values = None
        return first

    def step(self, live):
        """Positions and mask of the next token: the model's own."""
        return None, None


def _attend(module, query, key, value, mask, scaling=None, **kwargs):
    """Attention of one query in each row; the query heads of a KV head are rows of one product."""
    if beyond := models.beyond_causal(key.shape[2], kwargs):
        raise kind.Unsupported(f"layer {module.layer_idx} has {beyond}, which decoding in batches leaves out")
    rows, heads, _, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)
    with sdpa_kernel(_BACKENDS):
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


transformers.AttentionInterface.register(_NAME, _attend)


@torch.no_grad()
def decode(model, caches, first, most, ends):
    """Returns the tokens of each row from its first new one on, up to one of `ends` or a most of its own.

    caches: Caches, or Joined; most: descending.
    """
    cache = caches.start()
    steps, ended = [first], torch.isin(first, ends)
    model.set_attn_implementation(caches.attention)
    try:
        for step in range(1, most[0]):
            live = sum(each > step for each in most)
            if bool(ended[:live].all()):
                break
            positions, mask = caches.step(live)
            last = steps[-1][:live, None]
            out = model(last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            steps.append(out.logits[:, -1].argmax(-1))
            ended[:live] |= torch.isin(steps[-1], ends)
    finally:
        model.set_attn_implementation("sdpa")
    end = set(ends.tolist())
    taken = [step.tolist() for step in steps]
    for row in range(len(most)):
        tokens = [step[row] for step in taken if row < len(step)]
        yield tokens[: next((i for i, token in enumerate(tokens) if token in end), len(tokens))]
