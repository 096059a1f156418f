"""After a run: attention, filters, features, reconstructions, as a page."""
