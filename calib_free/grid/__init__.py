"""Number formats, and the rounding of matrices to them."""
