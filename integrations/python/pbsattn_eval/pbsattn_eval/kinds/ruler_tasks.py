"""RULER's 13 task types (arXiv 2404.06654, appendix B), their prompts made anew."""

import dataclasses
import typing

from .haystack import hide, item_random, made_up_words, number, things, uuid


@dataclasses.dataclass
class Prompt:
    """A prompt for as many pieces as fit: what is said, how the answer begins, and what it should hold."""

    build: typing.Callable[[int], str]
    begun: str
    expected: list[str]
    answer_tokens: int
    any_will_do: bool = False  # one of `expected`; else the share of them counts


def _and(names):
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ------------------------------------------------------------------------------------------------- needles


def _fact(key, value):
    return f"The special value of the {key} is {value}."


def _needles(rng, filler, keys, asked=1, values=1, value=number):
    """Facts about `keys`, the first `asked` of which are asked for and have `values` values each, hidden in filler."""
    expected = [value(rng) for _ in range(asked * values)]
    facts = [(rng.random(), _fact(keys[i // values], each)) for i, each in enumerate(expected)]
    facts += [(rng.random(), _fact(key, value(rng))) for key in keys[asked:]]
    rng.shuffle(facts)
    named = _and([f"the {key}" for key in keys[:asked]])
    what = f"special value of {named} is" if len(expected) == 1 else f"special values of {named} are"
    noun, verb = what.rsplit(" ", 1)
    seed = rng.random()

    def build(n):
        text = " ".join(hide(filler(item_random(seed), n), facts))
        return (
            f"Special values of things are hidden in the text below. Remember them; some will be asked for.\n\n{text}\n\n"
            f"What {verb} the {noun} given in the text?"
        )

    tokens = 44 if value is uuid else 10
    return Prompt(build, f"The {what}", expected, 6 + tokens * len(expected))


def _repeated_noise(rng, n):
    """RULER's noise says the same few things again and again."""
    return ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * n


def _facts_alone(rng, make_keys, value):
    """A needle in a haystack of facts like it."""
    [key] = make_keys(rng, 1)

    def others(rng, n):
        keys = [each for each in make_keys(rng, n + 1) if each != key]
        return [_fact(each, value(rng)) for each in keys[:n]]

    return _needles(rng, others, [key], value=value)


def niah_single_1(rng, filler):
    return _needles(rng, _repeated_noise, things(rng, 1))


def niah_single_2(rng, filler):
    return _needles(rng, filler, things(rng, 1))


def niah_single_3(rng, filler):
    return _needles(rng, filler, things(rng, 1), value=uuid)


def niah_multikey_1(rng, filler):
    return _needles(rng, filler, things(rng, 4))


def niah_multikey_2(rng, filler):
    return _facts_alone(rng, made_up_words, number)


def niah_multikey_3(rng, filler):
    return _facts_alone(rng, lambda rng, n: [uuid(rng) for _ in range(n)], uuid)


def niah_multivalue(rng, filler):
    return _needles(rng, filler, things(rng, 1), values=4)


def niah_multiquery(rng, filler):
    return _needles(rng, filler, things(rng, 4), asked=4)


# -------------------------------------------------------------------------------------- variables and words


def variable_tracking(rng, filler):
    """One value handed from variable to variable: all that have it are asked for."""
    names = [name.upper() for name in made_up_words(rng, 5)]
    value = number(rng, 5)
    lines = [f"VAR {name} = {value if i == 0 else f'VAR {names[i - 1]}'}." for i, name in enumerate(names)]
    hidden = list(zip(sorted(rng.random() for _ in names), lines))

    def build(n):
        return (
            "Variables are assigned in the text below. Follow the chain of assignments.\n\n"
            f"{' '.join(hide(_repeated_noise(rng, n), hidden))}\n\n"
            f"Which {len(names)} variables are assigned the value {value} in the text, directly or through other variables?"
        )

    return Prompt(build, f"The {len(names)} variables that are assigned the value {value} are:", names, 50)


def common_words(rng, filler):
    """Ten words stand in a list thirty times each, the others three times."""
    common, seed = made_up_words(rng, 10), rng.random()

    def build(n):
        own = item_random(seed)
        others = [word for word in made_up_words(own, n + len(common)) if word not in common][:n]
        words = common * 30 + others * 3
        own.shuffle(words)
        listed = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        return (
            f"Below is a numbered list of words. Some come often in it, the others rarely.\n\n{listed}\n\n"
            "What are the 10 most common words in the list?"
        )

    return Prompt(build, "The 10 most common words in the list are:", common, 80)


def frequent_words(rng, filler):
    """Words of a coded text, the k-th most frequent with a share of 1 / k^2; the first is noise and doesn't count."""
    vocabulary, seed = ["...", *made_up_words(rng, 400)], rng.random()
    weights = [1 / k**2 for k in range(1, len(vocabulary) + 1)]

    def build(n):
        counts = [round(20 * n * weight / sum(weights)) for weight in weights]
        words = [word for word, count in zip(vocabulary, counts) for _ in range(count)]
        item_random(seed).shuffle(words)
        return (
            "Below is a coded text. Find the three words that come most often in it, and ignore the dots.\n\n"
            f"{' '.join(words)}\n\nWhat are the three most frequent words in the coded text?"
        )

    return Prompt(build, "The three most frequent words in the coded text are:", vocabulary[1:4], 30)


# ---------------------------------------------------------------------------------------- questions on documents


_TRADES = "baker botanist carpenter composer glazier physician potter sculptor surveyor weaver".split()
_RIVERS = "Arda Belm Corre Dorn Elve Ferra Gant Holm Isken Jorra Kelve Lome".split()


def _people(rng, count):
    """(name, document, town) of made-up people, and {town: (document, river)}."""
    names = [f"{first.title()} {last.title()}" for first, last in zip(made_up_words(rng, count), made_up_words(rng, count))]
    towns = [f"{word.title()}stead" for word in made_up_words(rng, count)]
    people, places = [], {}
    for name, town in zip(names, towns):
        river, year = rng.choice(_RIVERS), rng.randrange(1700, 1950)
        people.append(
            (
                name,
                f"{name} was born in {town} in {year}, became a {rng.choice(_TRADES)} at the age of "
                f"{rng.randrange(14, 40)}, and had {rng.randrange(2, 9)} children.",
                town,
            )
        )
        places[town] = (
            f"{town} is a market town on the river {river}. It has {rng.randrange(2, 90)} hundred inhabitants "
            f"and was first named in {year - rng.randrange(100, 600)}.",
            river,
        )
    return people, places


def _documents(rng, ask, begun, expected, wanted, others):
    """A question on the documents `wanted`, which stand somewhere among documents others(rng, n)."""
    hidden, seed = [(rng.random(), each) for each in wanted], rng.random()

    def build(n):
        documents = hide(others(item_random(seed), n), hidden)
        listed = "\n\n".join(f"Document {i}: {text}" for i, text in enumerate(documents, 1))
        return f"Answer the question on the documents below.\n\n{listed}\n\nQuestion: {ask}"

    return Prompt(build, begun, expected, 24, any_will_do=True)


def qa_1(rng, filler):
    [(name, document, town)], _ = _people(rng, 1)

    def others(rng, n):
        return [each[1] for each in _people(rng, n)[0]]

    return _documents(rng, f"In which town was {name} born?", f"{name} was born in", [town], [document], others)


def qa_2(rng, filler):
    """Two documents are needed: where somebody was born, and what that town is like."""
    [(name, document, town)], places = _people(rng, 1)
    place, river = places[town]

    def others(rng, n):
        people, towns = _people(rng, n // 2 + 1)
        texts = [each[1] for each in people] + [text for text, _ in towns.values()]
        rng.shuffle(texts)
        return texts[:n]

    return _documents(
        rng,
        f"On which river lies the town in which {name} was born?",
        f"The town in which {name} was born lies on the river",
        [river],
        [document, place],
        others,
    )


TASKS = {
    each.__name__: each
    for each in (
        niah_single_1,
        niah_single_2,
        niah_single_3,
        niah_multikey_1,
        niah_multikey_2,
        niah_multikey_3,
        niah_multivalue,
        niah_multiquery,
        variable_tracking,
        common_words,
        frequent_words,
        qa_1,
        qa_2,
    )
}
