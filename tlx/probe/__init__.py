"""Choose before you train, on stored features: many heads at once (`grid`), backbones and where to cut them (`ranking`,
`depths`), what fine-tuning would add (`forecast`), few pictures (`episodes`). No picture is computed twice."""
