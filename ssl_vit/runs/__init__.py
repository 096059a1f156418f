"""Across runs: status, table, curves."""
