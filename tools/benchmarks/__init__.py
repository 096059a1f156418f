"""Benchmarks: each is one process in which the contestants take turns. See docs/performance.md."""
