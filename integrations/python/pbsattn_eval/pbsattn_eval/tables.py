"""Tables for people, as text."""


def show(value, form):
    """A number as `form` has it; None is an empty cell."""
    return "" if value is None else form.format(value)


def aligned(rows, left):
    """Rows of cells, the first one the head, as lines: the columns of these names to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    pad = [str.ljust if name in left else str.rjust for name in rows[0]]
    return "\n".join("  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows)
