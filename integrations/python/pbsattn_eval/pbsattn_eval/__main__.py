"""python -m pbsattn_eval: evaluations of methods on a model, pages of them, and benchmarks."""

import sys

from . import __version__

BOTH = "pip install . ./integrations/python/pbsattn_eval, in the source tree, brings both"

try:
    import pbsattn
    from pbsattn import program
except ModuleNotFoundError as error:
    sys.exit(
        f"pbsattn_eval: needs pbsattn, which is not installed; {BOTH}"
        if error.name == "pbsattn"
        else f"pbsattn_eval: {error}"
    )
except ImportError as error:  # PyTorch is missing, for example
    sys.exit(f"pbsattn_eval: {error}")

if pbsattn.__version__ != __version__:
    sys.exit(
        f"pbsattn_eval {__version__}: goes with pbsattn of the same version, and {pbsattn.__version__} is installed; {BOTH}"
    )


def main():
    """Returns the exit status of the command."""
    from . import commands

    return commands.run_main()


program.run("pbsattn_eval", main)
