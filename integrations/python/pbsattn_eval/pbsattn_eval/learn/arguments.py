"""The options of learn, and its help."""

HELP = "for a model an order of keys that is predicted from the key alone, where such an order pays, as a file NAME.pbs"
DESCRIPTION = """
Fits an order of keys that is predicted from the key alone, and finds whether it pays: blocks that are kept or left by their
scores hold more of the attention when keys that are attended to stand together. Needs no queries, so that a key's place is
known when it is written.

Each text has to have three times --tokens tokens, of which it takes
  the first part   to fit: in each layer and KV head, a linear model of a key's features (the lengths of its RoPE pairs,
                   and its numbers) that predicts the attention which the key will get
  the second part  to find the heads that it pays for: the fewest that have four fifths of what those heads gain
                   that gain more than a standard error, in attention that lies in blocks left out, and in blocks kept
  the third part   to judge: the loss under two-step scores, at equal density, with keys in no order, in that of the last
                   queries (by query head, and by KV head as `arrival` has it), in the learned one, and in the learned one
                   where it pays
What lowers the loss by more than two standard errors against no order, and raises it on no text by more than one, goes into
the file; else the file says that keys stay where they are. Where a text then loses more than .01 nats against full
attention, with its standard error, the file has a lower threshold, the highest of a few at which none does. Fit at the
length that you serve, on texts of the kind that you serve; ./dev learn takes Python's language reference and its
library's source where no --text is given.

  python -m pbsattn_eval learn --model model.gguf --text prose=book.txt --text code=code.txt --to model.pbs

A run that was stopped, by Ctrl-C too, goes on where it was when the same command is run again.
"""


def add_arguments(parser):
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="[LABEL=]FILE",
        help="a text in UTF-8 of three times --tokens tokens; may be repeated",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=8192,
        metavar="N",
        help="of each of a text's three parts: what you serve (default 8192)",
    )
    parser.add_argument(
        "--thresholds",
        metavar="T,T,...",
        help="at which orders are compared, two or more: blocks are kept that hold at least T of a row's attention "
        "(default: what two-step has at this length, and twice that)",
    )
    parser.add_argument("--to", required=True, metavar="FILE", help="NAME.pbs, which the runtime reads")
    parser.add_argument("--out", metavar="FOLDER", help="of the run (default eval-runs/learn-MODEL)")
    parser.add_argument("--json", metavar="FILE", help="write the table's rows as JSON; - for the standard output")
    parser.add_argument("--commit", help="what to write as the commit (default: that of the source tree)")
