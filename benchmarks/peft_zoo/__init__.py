"""Adapters of every kind on small models, for benchmarks."""
