"""One package per target: the formats it stores, its lowering, and its runtime."""
