"""Benchmarks: each a module with its command in the first lines."""
