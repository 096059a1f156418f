"""Images: folder -> shards -> plan -> batches."""
