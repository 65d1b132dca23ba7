"""Measurements of whole models: python -m pbsattn.bench prefill --help."""
