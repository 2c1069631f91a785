"""Numbers and pictures of a run, from its files alone; needs numpy, and matplotlib for pictures."""
