"""From bytes to pixels: decoding, orientation, the part that is shown, transforms."""
