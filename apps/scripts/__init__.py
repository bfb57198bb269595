"""Short programs to copy and change; each runs as it is on the built-in models."""
