"""Evaluations and benchmarks of pbsattn's methods: python -m pbsattn_eval --help. They use public names of pbsattn alone."""

__version__ = "0.2.0"  # of the pbsattn that it goes with
