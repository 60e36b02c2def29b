"""What frozen layers compute, kept: where a network may be cut (`cut`), features on disk (`store`), and batches of them
(`stored`). Which phases train from them: :mod:`tlx.train.cached`."""
