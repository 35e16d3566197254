"""A team's matrix of exports, proven again with every change: `lfmc check`."""
