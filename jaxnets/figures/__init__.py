"""Experiments from the papers, one module each: `measure` finds the data, `draw` makes the figure of them."""
