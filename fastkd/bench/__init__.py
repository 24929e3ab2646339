"""Benchmarks, run by `python -m fastkd.bench`."""
