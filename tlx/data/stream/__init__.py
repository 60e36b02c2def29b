"""From shards to batches: order, sampling, who reads what, worker processes, memory they share, the device."""
