"""Evaluations of methods on a model: python -m pbsattn eval --help, docs/eval.md."""
