"""Graph rewrites, one per file; `pipeline.py` is the only ordered list."""

import lfmc.graph.ops  # noqa: F401 (registers the operators that passes put into graphs)
