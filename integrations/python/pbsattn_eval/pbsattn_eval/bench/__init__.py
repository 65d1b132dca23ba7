"""Measurements of the op and of whole models: python -m pbsattn_eval bench --help."""
