"""The kinds of evaluations: ../kind.py lists them."""
