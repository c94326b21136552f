"""Benchmarks: one question a file. `make bench`, `make bench ONLY=name`; docs/benchmarks.md has the results."""
