"""Pruning and steering of vision-language models. Nothing is here yet."""
