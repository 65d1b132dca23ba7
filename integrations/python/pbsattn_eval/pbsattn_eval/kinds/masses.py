"""True attention of one layer, block by block, in plain PyTorch: what recall is counted in, and the oracle's choice.

Rows are blocks of 128 queries, as in the library. All of it in float32, some rows at a time.
"""

import torch

BLOCK = 128
_SCORES = 1 << 26  # of one step: 256 MB


def _steps(q, kv_len):
    """(first query, last query) of steps that are whole rows."""
    queries = max(_SCORES // kv_len // BLOCK, 1) * BLOCK
    return [(at, min(at + queries, q.shape[1])) for at in range(0, q.shape[1], queries)]


def _probabilities(q, k, head, first, last, scale, visible=None):
    """Causal attention weights of queries first .. last - 1 of a head over keys 0 .. last - 1."""
    group = q.shape[0] // k.shape[0]
    scores = q[head, first:last].float() @ k[head // group, :last].float().T * scale
    scores[:, first:] = scores[:, first:].masked_fill(
        torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1), -torch.inf
    )
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1)


def _row_means(weights):
    """[queries, keys] -> [rows, keys], the mean over each row's queries."""
    tail = -weights.shape[0] % BLOCK
    count = torch.full((-(-weights.shape[0] // BLOCK), 1), float(BLOCK), device=weights.device)
    if tail:
        weights = torch.cat([weights, weights.new_zeros(tail, weights.shape[1])])
        count[-1] -= tail
    return weights.view(-1, BLOCK, weights.shape[1]).sum(1) / count


def true_attention(q, k, v, scale):
    """Mass of every key for every row, [heads, rows, keys], and the output, [heads, queries, head_dim].

    q: [Hq, N, D]; k, v: [Hkv, N, D].
    """
    heads, tokens, width = q.shape
    rows = -(-tokens // BLOCK)
    mass = torch.zeros(heads, rows, tokens, device=q.device)
    out = torch.empty(heads, tokens, width, device=q.device)
    for head in range(heads):
        values = v[head // (heads // v.shape[0])].float()
        for first, last in _steps(q, tokens):
            weights = _probabilities(q, k, head, first, last, scale)
            out[head, first:last] = weights @ values[:last]
            mass[head, first // BLOCK : -(-last // BLOCK), :last] = _row_means(weights)
    return mass, out


def block_masses(mass, order, segment):
    """[heads, rows, blocks]: of the permuted sequence, and in a row's own segment of the original one, as rows see them."""
    rows = mass.shape[1]
    permuted = _by_block(mass.gather(2, order.long()[:, None].expand(-1, rows, -1)))
    own = own_segment(rows, permuted.shape[2], segment, mass.device)
    return torch.where(own, _by_block(mass), permuted)


def _by_block(mass):
    heads, rows, tokens = mass.shape
    return torch.nn.functional.pad(mass, (0, -tokens % BLOCK)).view(heads, rows, -1, BLOCK).sum(3)


def own_segment(rows, blocks, segment, device):
    """[rows, blocks]: blocks of a row's own segment, up to its end."""
    first = torch.arange(rows, device=device) * BLOCK // segment * (segment // BLOCK)
    block = torch.arange(blocks, device=device)
    return (block >= first[:, None]) & (block < first[:, None] + segment // BLOCK)


def oracle_choice(masses, order, options):
    """Blocks that an `exact` score keeps by the rule of `options`, [heads, rows, blocks] of bool.

    Toward top_p the own segment and token 0's block count first, as in the library (docs/methods.md).
    """
    heads, rows, blocks = masses.shape
    block = torch.arange(blocks, device=masses.device)
    row = torch.arange(rows, device=masses.device)[:, None]
    causal = block <= row
    own = own_segment(rows, blocks, options["segment"], masses.device) & causal
    first = torch.zeros(heads, 1, blocks, dtype=torch.bool, device=masses.device)
    first.scatter_(2, ((order == 0).int().argmax(1) // BLOCK)[:, None, None], True)

    scored = (causal & ~own).expand(heads, -1, -1)
    rule = options["keep"]
    if rule == "top_p":
        scored = scored & ~first
    score = masses.masked_fill(~scored, -1.0)
    value, place = score.sort(dim=-1, descending=True, stable=True)
    if rule == "top_p":
        share = value.clamp(min=0)
        counted = (masses * (own | first & causal)).sum(-1, keepdim=True)
        chosen = counted + share.cumsum(-1) - share < options["top_p"]
    elif rule == "threshold":
        chosen = value >= options["threshold"]
    elif rule == "relative":
        chosen = value >= options["threshold"] * masses.amax(-1, keepdim=True)
    elif rule == "top_k":
        chosen = (block < options["top_k"]).expand_as(value)
    elif rule == "density":
        before = (causal & ~own).sum(-1, keepdim=True)
        wanted = torch.tensor(options["density"], dtype=torch.float32).double().item() * (row + 1)
        chosen = (block < (wanted.double() - (row + 1 - before)).ceil()).expand_as(value)
    else:
        chosen = torch.ones_like(scored)
    picked = torch.zeros_like(scored).scatter(2, place, chosen & (value >= 0))
    always = own | first | (block < options["sink_blocks"]) | (block > row - options["local_blocks"])
    if options["dense_last_rows"]:
        always = always | (row >= rows - options["dense_last_rows"])
    return (picked | always) & causal


def attend(q, k, v, scale, kept, order, segment):
    """Output of attention to the kept blocks, [heads, queries, head_dim]."""
    heads, tokens, width = q.shape
    out = torch.empty(heads, tokens, width, device=q.device)
    for head in range(heads):
        values = v[head // (heads // v.shape[0])].float()
        slot = torch.empty(tokens, dtype=torch.long, device=q.device)
        slot[order[head].long()] = torch.arange(tokens, device=q.device)
        original = torch.arange(tokens, device=q.device) // BLOCK
        own = own_segment(kept.shape[1], kept.shape[2], segment, q.device)
        by_key = torch.where(own[:, original], kept[head][:, original], kept[head][:, slot // BLOCK])
        for first, last in _steps(q, tokens):
            rows = torch.arange(first, last, device=q.device) // BLOCK
            weights = _probabilities(q, k, head, first, last, scale, by_key[rows, :last])
            out[head, first:last] = weights @ values[:last]
    return out
