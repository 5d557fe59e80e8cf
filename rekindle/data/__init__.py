"""Text → tokens → shards → batches."""
