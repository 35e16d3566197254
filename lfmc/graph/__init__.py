"""The traced decoder: an `fx` program, the `lfm::` operators, and the planned weights."""
