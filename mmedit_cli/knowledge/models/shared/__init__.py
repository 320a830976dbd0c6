"""What the model families share: batches, prefixes, anchors, loading, tiny models."""
