"""The loop and its parts: a start of a training, steps, phases, evaluation, optimizers, objectives, memory."""
