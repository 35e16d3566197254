"""Graph rewrites, one a file; `pipeline.py` is the only ordered list of them."""

import lfmc.graph.ops  # noqa: F401 (registers the operators that passes put into graphs)
