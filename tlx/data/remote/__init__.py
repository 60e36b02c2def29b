"""Shards that lie elsewhere: asked for, copied, kept on this machine."""
