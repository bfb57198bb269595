"""Batch jobs: rows of a file in, files out, whatever happens in between."""
