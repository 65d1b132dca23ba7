"""The fit of an order: features of a key, the attention that it gets from later queries, ridge regression of one on the
other, and what an order is worth to blocks that a threshold keeps or leaves.

All of a layer's: queries q [query heads, tokens, D], keys k [KV heads, tokens, D], of any dtype. Sums of the regression are
float64. Everything is computed where q and k are, and nothing waits for it there.
"""

import torch

VERSION = 1  # of the fit and of what is judged: one more whenever equal texts can come to other numbers
SEGMENT = 256
BLOCK = 128
RIDGE = 1e-3  # of the mean diagonal
_QUERIES = 8  # of a block, evenly spaced, the last among them: whose attention is looked at
MOST = 0.8  # of what heads gain that gain more than a standard error: the share of those that get it where it pays
_LEAST = 1e-9  # attention under which keys are alike


def features(k, pairs):
    """[..., D] -> [..., 3 D / 2] float32: the lengths of a key's RoPE pairs, then its numbers."""
    k = k.float()
    half = k.shape[-1] // 2
    a, b = (k[..., :half], k[..., half:]) if pairs == "halves" else (k[..., 0::2], k[..., 1::2])
    return torch.cat([torch.hypot(a, b), k], -1)


def row_masses(q, k, scale):
    """The attention that each row, a block of queries, pays to each key: of a query head after the other, [rows, tokens].

    The tokens of complete segments alone count, as keys and as queries. A row's is the mean of some of its queries'.
    """
    tokens = k.shape[1] // SEGMENT * SEGMENT
    at = torch.arange(BLOCK // _QUERIES - 1, tokens, BLOCK // _QUERIES, device=q.device)
    future = torch.arange(tokens, device=q.device) > at[:, None]
    for head in range(q.shape[0]):
        keys = k[head // (q.shape[0] // k.shape[0]), :tokens].float()
        scores = (q[head, at].float() @ keys.T).mul_(scale).masked_fill_(future, -torch.inf)
        yield scores.softmax(-1).view(-1, _QUERIES, tokens).mean(1)


def earlier(rows, device):
    """[rows, segments]: whether a segment lies before the row's own, so that its keys' order matters to the row."""
    own = torch.arange(rows, device=device) * BLOCK // SEGMENT
    return own[:, None] > torch.arange(rows * BLOCK // SEGMENT, device=device)


def _by_segment(values):
    """[..., tokens] -> [..., segments, SEGMENT]."""
    return values.unflatten(-1, (-1, SEGMENT))


def targets(q, k, scale):
    """log of the mean weight of each key under the rows of later segments, [KV heads, tokens of complete segments]."""
    group = q.shape[0] // k.shape[0]
    tokens = k.shape[1] // SEGMENT * SEGMENT
    seen = earlier(tokens // BLOCK, q.device).float().repeat_interleave(SEGMENT, 1)
    made = torch.zeros(k.shape[0], tokens, device=q.device)
    for head, mass in enumerate(row_masses(q, k, scale)):
        made[head // group] += (mass * seen).sum(0) / seen.sum(0).clamp_(min=1) / group
    return made.add_(_LEAST).log_()


def equations(q, k, scale, pairs):
    """Normal equations of the ridge, a [KV heads, F, F] and b [KV heads, F], F = 3 D / 2: of features against targets, both
    centred within each segment. Keys count that have at least a quarter of the text's tokens after them.

    Those of several texts add up.
    """
    wanted = targets(q, k, scale)
    segments = wanted.shape[1] // SEGMENT * 3 // 4
    given = features(k, pairs)[:, : segments * SEGMENT].unflatten(1, (segments, SEGMENT)).double()
    given = (given - given.mean(2, keepdim=True)).flatten(1, 2)
    wanted = _by_segment(wanted)[:, :segments].double()
    wanted = (wanted - wanted.mean(2, keepdim=True)).flatten(1, 2)
    return given.mT @ given, (given.mT @ wanted[..., None])[..., 0]


def solve(a, b):
    """Weights [..., F] float32 of normal equations a [..., F, F], b [..., F]."""
    diagonal = a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.linalg.solve(a + RIDGE * diagonal * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), b).float()


def scores(k, weights, pairs):
    """What keys stand by, in descending order: [KV heads, tokens of complete segments]."""
    tokens = k.shape[1] // SEGMENT * SEGMENT
    return (features(k[:, :tokens], pairs) @ weights[..., None])[..., 0]


def upper(scores):
    """[..., tokens] -> bool: the keys that stand in the first half of their segment, in descending score, equal ones as they
    were. With blocks of half a segment that is all of an order that counts."""
    by_segment = _by_segment(scores)
    place = by_segment.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(by_segment, dtype=torch.bool)
    chosen.scatter_(-1, place[..., :BLOCK], True)
    return chosen.flatten(-2)


def costs(q, k, scale, orders, thresholds):
    """What each row loses under each order, [orders, query heads, rows]: the mean over thresholds of the mass in blocks that
    it leaves, and a threshold for each block that it keeps, where it does what is best.

    That is the sum of min(mass, threshold) over the blocks of earlier segments. It falls when an order parts the keys of a
    segment that are attended to from those that aren't. orders: the keys that stand in the first half of their segment,
    [KV heads or query heads, tokens] of bool each.
    """
    made = []
    for head, mass in enumerate(row_masses(q, k, scale)):
        rows = mass.shape[0]
        before = earlier(rows, q.device)
        by_segment = _by_segment(mass)
        whole = by_segment.sum(2)
        of_orders = []
        for order in orders:
            first = _by_segment(order[head * order.shape[0] // q.shape[0]])
            a = torch.einsum("rsk,sk->rs", by_segment, first.float())
            halves = torch.stack([a, (whole - a).clamp_(min=0)])
            lost = torch.stack([halves.clamp(max=threshold).sum(0) for threshold in thresholds]).mean(0)
            of_orders.append((lost * before).sum(1))
        made.append(torch.stack(of_orders))
    return torch.stack(made, 1)


def paying(gains):
    """The heads that an order pays for, [layers, KV heads] of bool: of those that gain more than a standard error the fewest
    that have most of the gain together. gains: [layers, KV heads, rows], by how much a row costs less."""
    mean = gains.mean(-1)
    mean = torch.where(mean > gains.std(-1) / gains.shape[-1] ** 0.5, mean, 0.0)
    highest, head = mean.flatten().sort(descending=True, stable=True)
    before = highest.cumsum(0) - highest
    chosen = (before < MOST * highest.sum()) & (highest > 0)
    return torch.zeros_like(chosen).scatter(0, head, chosen).view(mean.shape)
