"""Long prompts of a given number of tokens: sentences to hide things in, and names that can't be guessed."""

import random
import re

from . import ppl

_ADJECTIVES = """amber ancient bright broken bronze calm copper crimson crooked curious distant dusty early empty faded
 fragile frozen gentle golden green hollow humble idle ivory late little lonely narrow northern old pale patient plain
 quiet rusty scarlet silent silver slender southern spare steady sturdy sunken tall tired velvet wooden yellow""".split()
_NOUNS = """anchor apron basket bell bench bicycle blanket boat bottle bridge broom bucket candle carpet cart chair chest
 clock coat compass cup curtain drum engine fence ferry fiddle flag garden gate hammer harbour hat hedge kettle kite
 ladder lamp lantern letter lock mill mirror needle oar orchard oven paddle painting pillow pitcher plough pump quilt
 raft ribbon rope saddle sail scarf shovel sledge spoon stove table tent tower trumpet tunnel vase violin wagon wall
 well wheel whistle window""".split()
_PEOPLE = """baker beekeeper blacksmith captain carpenter clerk cook dentist doctor driver farmer fisherman gardener
 grocer guard judge librarian mason mayor miller nurse painter pilot poet postman printer sailor shepherd singer smith
 student tailor teacher traveller waiter weaver""".split()
_VERBS = """admired borrowed bought carried cleaned counted described drew fetched followed forgot found fixed hid kept
 lent lifted measured mended moved noticed painted photographed polished pulled pushed remembered repaired returned
 sketched sold studied touched turned watched weighed wrapped""".split()
_PLACES = """attic barn bay beach cellar churchyard corridor courtyard factory field forest hall hill hotel island kitchen
 lake library market meadow museum path pier pond quarry river road school shop square stable station street theatre
 valley village workshop yard""".split()
_TIMES = """after breakfast;after the concert;after the rain;all morning;at dawn;at midday;at night;before the storm;
 during the fair;in autumn;in spring;in the afternoon;last winter;long ago;on a Sunday;on the first day;once a week;
 one evening;that summer;twice a year;while it snowed;without a word""".replace("\n ", "").split(";")
_SYLLABLES = """ba be bo da de di do fa fe fi ga go ha he ho ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe pi po ra
 re ri ro sa se si so ta te ti to va ve vi vo za ze zi zo""".split()


def item_random(*parts):
    """Random numbers of one item, the same on every machine and in every run."""
    return random.Random("|".join(map(str, parts)))


def sentence(rng):
    """An ordinary sentence that tells nothing anyone will ask for."""
    place, time = rng.choice(_PLACES), rng.choice(_TIMES)
    text = (
        f"the {rng.choice(_PEOPLE)} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} near the {place}"
    )
    text = f"{time}, {text}" if rng.random() < 0.4 else f"{text} {time}"
    return text[0].upper() + text[1:] + "."


def things(rng, count):
    """Different names of things, as "amber lantern"."""
    every = len(_ADJECTIVES) * len(_NOUNS)
    if count > every:
        raise ValueError(f"{count} different things: there are {every}; ask for fewer")
    return [f"{_ADJECTIVES[i // len(_NOUNS)]} {_NOUNS[i % len(_NOUNS)]}" for i in rng.sample(range(every), count)]


def made_up_words(rng, count):
    """Different words that no language has."""
    every = len(_SYLLABLES) ** 3
    n = len(_SYLLABLES)
    return [_SYLLABLES[i // n // n] + _SYLLABLES[i // n % n] + _SYLLABLES[i % n] for i in rng.sample(range(every), count)]


def number(rng, digits=7):
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def uuid(rng):
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


class Filler:
    """Sentences without end: made up, or those of a text, from a random place in it on."""

    def __init__(self, path=None):
        self._sentences = None
        if path is not None:
            text = " ".join(ppl.read_text(path).split())
            self._sentences = [each for each in re.split(r"(?<=[.!?]) ", text) if each]
            if len(self._sentences) < 20:
                raise ValueError(f"text {path}: has {len(self._sentences)} sentences, 20 needed to hide anything between")

    def take(self, rng, count):
        """The same sentences for the same random numbers, whatever `count`, but for their number."""
        if self._sentences is None:
            return [sentence(rng) for _ in range(count)]
        start = rng.randrange(len(self._sentences))
        return [self._sentences[(start + i) % len(self._sentences)] for i in range(count)]


def hide(pieces, hidden):
    """Puts each (depth, text) of `hidden` between the pieces; depth 0 is before the first, 1 after the last."""
    at = {}
    for depth, text in hidden:
        at.setdefault(round(depth * len(pieces)), []).append(text)
    return [part for i in range(len(pieces) + 1) for part in (*at.get(i, ()), *pieces[i : i + 1])]


_FIRST_TRY = 256  # pieces: enough to tell how many tokens one takes, and few to encode


def fit(build, tokens, encode):
    """build(n), encoded, for about as many pieces n as `tokens` tokens hold, and never more; and n.

    Two pieces' tokens or a hundredth are left over at most. ValueError if build(0) is too long already.
    """
    best, fits, too_many = encode(build(0)), 0, None
    empty = len(best)
    if empty > tokens:
        raise ValueError(f"{tokens} tokens: the question alone takes {empty}; ask for longer prompts")
    n = _FIRST_TRY
    while too_many is None or too_many - fits > 1:
        ids = encode(build(n))
        each = max((len(ids) - empty) / n, 1)
        if len(ids) > tokens:
            too_many = n
        else:
            best, fits = ids, n
            if tokens - len(ids) < max(2 * each, tokens / 100):
                break
        n = max(n + int((tokens - len(ids)) / each) - (len(ids) > tokens), fits + 1)
        n = n if too_many is None else min(n, too_many - 1)
    return best, fits
