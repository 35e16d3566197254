"""The bit plan: one row per stored tensor, with checks and replay."""
