"""The run folder and what survives in it.

| you want to know | look in |
|---|---|
| who may write to the folder; `status.json` and its lock | `run_folder` (writes), `run_lock` |
| what stands in it | `run_files`, the one reader; `run_status`: as text for `tlx status`; `history`: for reports |
| checkpoints: written, renamed, kept, read, damaged | `checkpoint` |
| where a training stands, what it has counted | `progress` |
| rows of metrics.jsonl | `metrics_file` |
| requests to stop: signals, a file, the time limit | `stop`; before the imports: `processes` |
| going on by a longer plan; runs of earlier versions | `extend`; `older_meaning` |
"""
