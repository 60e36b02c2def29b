"""The configuration as data, and the plan that it is compiled into: who trains when, at which rate. No torch."""
