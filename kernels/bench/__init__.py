"""Timing attention against its peers: named problems, a check before every time, interleaved rounds, rows."""
