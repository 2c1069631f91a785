"""What a layout needs and how fast it is, computed before a single GPU is asked for."""
