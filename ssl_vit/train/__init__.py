"""The loop and what it stands on. Accelerate is imported in this folder only."""
