"""Report pages, and numbers as text."""
