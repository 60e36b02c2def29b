"""Shards as they lie: members of tars, labels, the index over them, what is looked at and told of them."""
