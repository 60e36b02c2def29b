"""What was trained, in use: a model that says what it is (`description`), loaded and asked (`model`). No launcher, no
configuration, no accelerate."""
