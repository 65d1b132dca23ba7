"""What kinds have in common that make prompts of a number of tokens: their options, and how a prompt is made to fit."""

from .. import kind
from . import haystack, ppl

_MOST = 1 << 24  # tokens


def numbers(option, text, least, most):
    """Numbers of a list with commas, each within bounds."""
    try:
        values = [int(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: not whole numbers with commas between") from None
    for value in values:
        if not least <= value <= most:
            raise ValueError(f"{option} {text}: {value} is not within {least} and {most}")
    if len(set(values)) != len(values):
        raise ValueError(f"{option} {text}: names a value twice")
    return values


def names(option, text, known):
    """Names of a list with commas, each a known one."""
    values = text.split(",")
    for value in values:
        if value not in known:
            raise ValueError(f'{option} {text}: "{value}" is none of {", ".join(known)}')
    return values


class PromptKind(kind.AskingKind):
    """A kind whose prompts hide something in filler, and end in the beginning of the answer."""

    lengths = ""  # of the prompts by default
    least = 0  # tokens of a prompt
    counts: tuple[tuple[str, int, str], ...] = ()  # options that take a number from 1 up: name, default, what of
    filler: haystack.Filler  # check() makes it

    def add_arguments(self, parser):
        parser.add_argument(
            "--lengths", default=self.lengths, metavar="N,N,...", help=f"tokens of the prompts (default {self.lengths})"
        )
        parser.add_argument(
            "--filler", metavar="FILE", help="a text to hide things in, in UTF-8 (default: made-up sentences)"
        )
        parser.add_argument("--seed", type=int, default=0, help="another seed makes other prompts (default 0)")
        for name, default, what in self.counts:
            parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})")

    def check(self, given):
        self.tokens(given)
        self.filler = haystack.Filler(given.filler)
        for name, _, _ in self.counts:
            if getattr(given, name) < 1:
                raise ValueError(f"--{name} {getattr(given, name)}: at least 1")

    def tokens(self, given):
        """The lengths asked for."""
        return numbers("--lengths", given.lengths, self.least, _MOST)

    def identity(self, name, value):
        return ppl.text_identity(value) if name == "filler" and value is not None else value

    @staticmethod
    def fit(engine, build, tokens, begun):
        """The tokens of build(n) and the beginning of the answer, for as many pieces as fit. Raises Unsupported for none."""
        try:
            return haystack.fit(build, tokens, lambda text: engine.chat(text, begun))[0]
        except ValueError as error:
            raise kind.Unsupported(str(error)) from None
