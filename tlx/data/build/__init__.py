"""From pictures to shards: sources, what is stored of a picture, who writes which shard."""
