"""A network cut into layers, by one rule for every network.

In this order; `structure.Anatomy` holds the result of the first four, and its `layers` makes the last step:

1. `trace`: one forward pass on shapes alone tells which modules run, in which order, where the data fork and join;
2. `units`: `cut` divides the network into the smallest pieces that freeze together (blocks, and what lies between);
3. `kinds`: what each parameter is (weight, bias, norm, embedding, scale);  `gradients`: which ones no loss reaches;
4. `groups`: units brought together at a granularity (module, block, stage);
5. `layer_assignment`: the layer of every parameter and module.
"""
