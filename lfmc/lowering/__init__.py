"""What a user requests, checked, and the fused program that a target lowers."""
