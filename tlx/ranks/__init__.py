"""The processes of one training: how they start, meet, compute together, and what becomes of them when one fails.

| you want to know | look in |
|---|---|
| what the launcher said, and whether the configuration agrees | `environment`, for accelerate `accelerate_settings` |
| how ranks find each other and join the process group | `rendezvous`; `store_prefix` tells one start from the next |
| what ranks sum, broadcast and gather; `World` | `collectives` |
| what one rank does for all, so that its mistake is everybody's | `together` |
| whether all ranks have the same configuration, code, weights, shards | `same_inputs` |
| **why a rank was declared dead, hung or lost** | `failure_detector`: all rules and their messages, pure |
| what a rank knows of the others, and the lock around it | `state` |
| how heartbeats travel | `heartbeat` |
| what writes RUN/stacks/rank-N.txt | `stacks` |
| who asks the detector once a second, tells status.json and ends the process | `watch` |
"""
