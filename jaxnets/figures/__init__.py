"""Experiments from the papers, one module each: `measure` obtains the data, `draw` makes the figure from them."""
