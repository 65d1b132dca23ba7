"""Measurements of the op and of whole models: python -m pbsattn.bench --help."""
