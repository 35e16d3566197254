"""Pages to look at: a plan, and memory by context. Facts are gathered first, then drawn."""
