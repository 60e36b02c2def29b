"""The run folder: who may write to it, checkpoints, metrics.jsonl, how a run stands, requests to stop."""
