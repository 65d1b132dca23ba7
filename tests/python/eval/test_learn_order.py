"""The fit of a learned order: it finds what attention goes by, and leaves alone the heads that it doesn't pay for."""

import itertools
import types

import pytest
import torch

import pbsattn

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval.learn import judge, order, steps

TOKENS, WIDTH = 4096, 16


def attended_by(scores, strength=3.0):
    """Queries and keys [1, TOKENS, WIDTH] of a head whose keys' logits are all queries' alike: `scores`, normalised."""
    k = torch.randn(1, TOKENS, WIDTH)
    k[0, :, 0] = (scores - scores.mean()) / scores.std()
    q = torch.zeros(1, TOKENS, WIDTH)
    q[0, :, 0] = strength
    return q, k


def fitted(q, k, pairs="halves"):
    return order.scores(k, order.solve(*order.equations(q, k, 1.0, pairs)), pairs)


def same_halves(a, b):
    """Share of keys that two scores put into the same half of their segment."""
    return (order.upper(a) == order.upper(b)).float().mean().item()


def test_it_finds_the_direction_that_attention_goes_by():
    q, k = attended_by(torch.randn(TOKENS))
    assert same_halves(fitted(q, k)[0], k[0, :, 0]) > 0.97


@pytest.mark.parametrize("pairs, columns", [("halves", (3, 3 + WIDTH // 2)), ("neighbours", (6, 7))])
def test_it_finds_the_pair_that_attention_goes_by(pairs, columns):
    """Queries that look every way of a pair's plane: the longer a key there, the more it gets."""
    k = torch.randn(1, TOKENS, WIDTH)
    angle = torch.arange(TOKENS) * 2.4
    q = torch.zeros(1, TOKENS, WIDTH)
    q[0, :, columns[0]], q[0, :, columns[1]] = 4 * angle.cos(), 4 * angle.sin()
    length = k[0, :, list(columns)].norm(dim=-1)
    assert same_halves(fitted(q, k, pairs)[0], length) > 0.9
    other = "neighbours" if pairs == "halves" else "halves"
    assert same_halves(fitted(q, k, other)[0], length) < 0.8


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_the_runtime_has_the_same_order(pairs):
    """Keys that stand in the first half of each segment, by weights on the same features; a head of zeros stays."""
    q, k = torch.randn(1, 4, 1100, 64), torch.randn(1, 2, 1100, 64)
    weights = torch.randn(2, 96)
    weights[1] = 0
    method = "two-step:permutation=learned:order_scope=kv_head"
    _, trace = pbsattn.trace(q, k, k, method=method, order_weights=weights, rope_pairs=pairs)
    chosen = order.upper(order.scores(k[0], weights, pairs))
    for head in range(4):
        slots = trace.order[0, head, :1024].view(-1, 2, order.BLOCK)[:, 0].flatten().long()
        assert chosen[head // 2].nonzero()[:, 0].tolist() == slots.sort().values.tolist()


def test_everything_stays_on_the_device_and_nothing_waits_for_it():
    """On a device that holds no numbers, where whatever reads one or brings a tensor of the CPU in fails."""
    q, k = (torch.empty(heads, TOKENS, WIDTH, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    a, b = order.equations(q, k, 1.0, "neighbours")
    scores = order.scores(k, order.solve(a, b), "neighbours")
    costs = order.costs(q, k, 1.0, [order.upper(torch.zeros_like(scores)), order.upper(scores)], [0.01, 0.02])
    assert costs.device.type == "meta" and costs.shape == (2, 4, TOKENS // order.BLOCK)
    with pytest.raises(NotImplementedError):
        a.cpu()


def test_query_heads_of_a_group_share_an_order():
    """Two query heads, each of which looks at keys of its own: both kinds stand in front."""
    k = torch.randn(1, TOKENS, WIDTH)
    q = torch.zeros(2, TOKENS, WIDTH)
    q[0, :, 0], q[1, :, 1] = 2.0, 2.0
    assert same_halves(fitted(q, k)[0], k[0, :, 0] + k[0, :, 1]) > 0.85


def test_equations_of_texts_add_up():
    (q, k), (q2, k2) = attended_by(torch.randn(TOKENS)), attended_by(torch.randn(TOKENS))
    (a, b), (a2, b2) = order.equations(q, k, 1.0, "halves"), order.equations(q2, k2, 1.0, "halves")
    assert a.dtype == torch.float64 and a.shape == (1, 24, 24) and b.shape == (1, 24)
    # Of one text twice as of once, but for rounding.
    torch.testing.assert_close(order.solve(a * 2, b * 2), order.solve(a, b))
    assert same_halves(order.scores(k2, order.solve(a + a2, b + b2), "halves")[0], k2[0, :, 0]) > 0.97


def test_targets_are_the_weights_under_later_segments():
    """Against the definition, query by query."""
    tokens = 5 * order.SEGMENT + 100
    q, k = torch.randn(2, tokens, 8), torch.randn(1, tokens, 8)
    expected = torch.zeros(5 * order.SEGMENT)
    queries = torch.zeros(5 * order.SEGMENT)
    for head, at in itertools.product(range(2), range(15, 5 * order.SEGMENT, 16)):
        weights = (q[head, at] @ k[0, : at + 1].T * 0.3).softmax(0)
        own = at // order.SEGMENT * order.SEGMENT
        expected[:own] += weights[:own]
        queries[:own] += 1
    made = order.targets(q, k, 0.3)[0]
    known = queries > 0
    torch.testing.assert_close(made[known], (expected[known] / queries[known] + 1e-9).log(), atol=1e-4, rtol=1e-4)


def test_costs_are_what_the_best_choice_of_blocks_loses():
    """Blocks that hold a threshold or more cost one, the others what they hold."""
    q, k = attended_by(torch.arange(TOKENS).float() % order.SEGMENT, strength=0.5)
    [mass] = order.row_masses(q, k, 1.0)
    first = torch.arange(TOKENS) % order.SEGMENT < order.BLOCK
    alternate = torch.arange(TOKENS) % 2 == 0
    made = order.costs(q, k, 1.0, [first[None], alternate[None]], [0.02])
    rows = TOKENS // order.BLOCK
    for chosen, of_order in zip((first, alternate), made):
        for row in (0, 1, 2, 7, rows - 1):
            expected = 0.0
            for segment in range(row * order.BLOCK // order.SEGMENT):
                keys = slice(segment * order.SEGMENT, (segment + 1) * order.SEGMENT)
                expected += min(0.02, float(mass[row, keys][chosen[keys]].sum()))
                expected += min(0.02, float(mass[row, keys][~chosen[keys]].sum()))
            assert of_order[0, row] == pytest.approx(expected, abs=1e-5)
    # Attention grows along each segment: as keys stand they are parted already.
    assert made[0].mean() < made[1].mean()


# ------------------------------------------------------------------------------------------ what pays


class Engine:
    """A model of one layer, whose queries and keys are those of a text's name."""

    layers, rope_pairs, device = 1, "halves", torch.device("cpu")

    def __init__(self, texts):
        self.texts = texts

    def each_layer(self, ids, visit):
        q, k = self.texts[ids]
        visit(0, q[None], k[None], None, 1.0)


def heads(*pairs):
    q, k = zip(*pairs, strict=True)
    return torch.cat(q), torch.cat(k)


def test_heads_that_it_does_not_pay_for_get_zeros(tmp_path):
    """Both heads' attention goes by a number of the key in the text that is fitted on. In the other text the second head's
    goes by the place in the segment, which the fit can't know of, so that keys had better stay."""
    place = -(torch.arange(TOKENS) % order.SEGMENT).float()
    stays = attended_by(place)
    stays[1][0, :, 1] = stays[1][0, :, 0]
    stays[0][0, :, 1] = stays[0][0, :, 0]
    stays[0][0, :, 0] = 0
    stays[1][0, :, 0] = torch.randn(TOKENS)
    texts = {
        "fit": heads(attended_by(torch.randn(TOKENS)), attended_by(torch.randn(TOKENS))),
        "try": heads(attended_by(torch.randn(TOKENS)), stays),
    }
    made = steps.Fitted(Engine(texts), {"text": ("fit", "try")}, tmp_path, [0.01, 0.02])
    assert made.pairs == "halves" and made.sizes == steps.file.Sizes(1, 2, 2, WIDTH)
    assert made.weights.shape == (1, 2, 24) and made.weights.any(-1).all()
    torch.testing.assert_close(made.paying[0, 0], made.weights[0, 0])
    assert not made.paying[0, 1].any()


def test_models_with_layers_of_another_kind_are_refused(tmp_path):
    engine = Engine({"fit": heads(attended_by(torch.randn(TOKENS)))})
    engine.layers = 3
    with pytest.raises(ValueError, match="model: 1 of its 3 layers have attention; an order is learned for models that"):
        steps.Fitted(engine, {"text": ("fit", "try")}, tmp_path, [0.01])
    assert not list(tmp_path.iterdir())


def test_the_fewest_heads_that_gain_most():
    certain = torch.tensor([1.0, 1.0, 1.0, 1.0])
    gains = torch.stack([6 * certain, certain, 3 * certain, -9 * certain]).view(2, 2, 4)
    assert order.paying(gains).tolist() == [[True, False], [True, False]]  # 9 of 10; 6 are too little
    chance = torch.tensor([9.0, -9.0, 9.0, -8.0])  # more than nothing on average, by less than a standard error
    assert order.paying(torch.stack([chance, certain])[None]).tolist() == [[False, True]]
    assert not order.paying(-gains[:1, :1]).any()


def test_finished_steps_are_not_computed_again(tmp_path):
    texts = {"fit": heads(attended_by(torch.randn(TOKENS))), "try": heads(attended_by(torch.randn(TOKENS)))}

    def killed(ids, visit):
        if ids == "try":
            raise KeyboardInterrupt
        Engine.each_layer(engine, ids, visit)

    engine = Engine(texts)
    engine.each_layer = killed
    with pytest.raises(KeyboardInterrupt):
        steps.Fitted(engine, {"text": ("fit", "try")}, tmp_path, [0.01])
    assert [path.name for path in tmp_path.iterdir()] == ["fit-text.safetensors"]
    engine.texts = {"try": texts["try"]}  # what is fitted on isn't asked for again
    engine.each_layer = types.MethodType(Engine.each_layer, engine)
    made = steps.Fitted(engine, {"text": ("fit", "try")}, tmp_path, [0.01])
    whole = steps.Fitted(Engine(texts), {"text": ("fit", "try")}, tmp_path_of(tmp_path), [0.01])
    assert torch.equal(made.weights, whole.weights) and torch.equal(made.paying, whole.paying)


def tmp_path_of(path):
    made = path / "other"
    made.mkdir()
    return made


# -------------------------------------------------------------------------------------------- judging


def records(losses, densities=(0.2, 0.4), texts=("a", "b"), blocks=16):
    """Records of a run: losses, {order: {text: change of the loss}} against one that differs from block to block."""
    base = torch.rand(blocks, generator=torch.Generator().manual_seed(1))
    noise = 0.01 * torch.randn(blocks, generator=torch.Generator().manual_seed(2))
    noise -= noise.mean()
    made = []
    for name, of_texts in losses.items():
        for text in texts:
            for setting, density in enumerate(densities):
                nll = base + of_texts[text] + (noise if name != judge.NONE else 0) + 0.1 * (1 - setting)
                made.append(
                    dict(
                        item=text,
                        group=text,
                        method=f"{name}:{setting}",
                        density=density,
                        metrics={"nll": nll.mean().item()},
                        units={"nll": nll.tolist()},
                    )
                )
    return made, {name: [f"{name}:{setting}" for setting in range(len(densities))] for name in losses}


NOTHING = {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize(
    "learned, last, taken",
    [
        ({"a": -0.02, "b": -0.02}, {"a": -0.01, "b": -0.01}, "learned"),
        ({"a": -0.02, "b": -0.02}, {"a": -0.03, "b": -0.03}, "last_queries"),
        ({"a": -0.1, "b": 0.02}, {"a": 0.0, "b": 0.0}, "none"),  # better on average, worse on a text
        ({"a": -0.0027, "b": -0.0027}, {"a": 0.01, "b": 0.01}, "none"),  # less than two standard errors
    ],
)
def test_an_order_is_taken_where_it_pays(learned, last, taken):
    judgements = judge.compare(*records({judge.NONE: NOTHING, "last_queries": last, "learned": learned}))
    by_name = {each.order: each for each in judgements}
    assert by_name["learned"].by_text["a"].mean == pytest.approx(learned["a"], abs=1e-6)
    whole = by_name["learned"].whole
    assert whole.mean == pytest.approx(sum(learned.values()) / 2, abs=1e-6) and (whole.blocks, whole.texts) == (32, 2)
    assert whole.densities == (pytest.approx(0.2 * 2**0.25), pytest.approx(0.2 * 2**0.75))
    assert judge.choose(judgements) == taken
    table = judge.table(judgements, dict.fromkeys(["none", "last_queries", "learned"], 3), taken).splitlines()
    assert [line.split()[0] for line in table if line.endswith("taken")] == [taken]


def test_orders_are_compared_at_equal_density():
    """An order that keeps more blocks at the same threshold, and loses less for it alone, is no better."""
    made, names = records({judge.NONE: NOTHING, "learned": NOTHING}, densities=(0.2, 0.8))
    for record in made:
        if record["method"].startswith("learned"):
            record["density"] *= 0.5**0.5
            record["units"]["nll"] = [value + 0.025 for value in record["units"]["nll"]]
    [judgement] = judge.compare(made, names)
    assert judgement.whole.mean == pytest.approx(0.0, abs=1e-6)


def test_each_texts_row_has_its_own_blocks_and_densities():
    made, names = records({judge.NONE: NOTHING, "learned": NOTHING})
    for record in made:
        if record["item"] == "b":
            record["density"] *= 2
            record["units"]["nll"] = record["units"]["nll"][:5]
    header = dict(kind="ppl", device="d", commit="c", date="today", model={"name": "m"})
    rows = {row["params"]["group"]: row for row in judge.rows(judge.compare(made, names), header)}
    a, b, both = (rows[name]["params"]["density"] for name in ("a", "b", "all"))
    assert 0.2 < a < 0.4 and b == pytest.approx(2 * a) and both == pytest.approx(1.5 * a)
    assert [rows[name]["runs"] for name in ("a", "b", "all")] == [16, 5, 21]
    assert [rows[name]["params"]["items"] for name in ("a", "b", "all")] == [1, 1, 2]


def test_orders_without_a_density_in_common_are_refused():
    made, names = records({judge.NONE: NOTHING, "learned": NOTHING})
    for record in made:
        record["density"] *= 3 if record["method"].startswith("learned") else 1
    with pytest.raises(ValueError, match="no density in common; pass --thresholds further apart"):
        judge.compare(made, names)


def test_orders_that_a_device_lacks_are_left_out():
    made, names = records({judge.NONE: NOTHING, "learned": NOTHING, "arrival": NOTHING})
    made[-1]["error"] = "the device lacks it"
    assert made[-1]["method"] == "arrival:1"
    kept, lines = judge.measured(made, names)
    assert list(kept) == [judge.NONE, "learned"] and lines == ["arrival: not judged: the device lacks it"]
    assert [each.order for each in judge.compare(made, kept)] == ["learned"]
    with pytest.raises(ValueError, match="arrival: not judged: the device lacks it"):
        judge.measured(made, {order: names[order] for order in (judge.NONE, "arrival")})
    made[0]["error"] = "the device lacks it"
    with pytest.raises(ValueError, match="order none: can't be measured: the device lacks it"):
        judge.measured(made, names)
