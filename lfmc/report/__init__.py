"""HTML reports about a plan or a checkpoint: facts are gathered first, then drawn."""
