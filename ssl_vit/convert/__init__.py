"""Images and the shards of others become shards with a manifest."""
