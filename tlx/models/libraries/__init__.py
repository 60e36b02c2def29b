"""Networks of torchvision, timm and other packages, under one set of questions."""
