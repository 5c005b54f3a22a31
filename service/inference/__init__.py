"""A loaded model answering on arrays: sessions, batch-invariant runs, the batcher, the thread pool."""
