"""Shared code of the targets for neural accelerators: graphs of fixed shapes without states."""
