"""What targets share whose graphs have fixed shapes and keep no states: neural accelerators."""
