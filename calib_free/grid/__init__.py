"""Number formats, and how a matrix is rounded to one."""
