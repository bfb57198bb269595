"""The CPU kernel: C++ with a plain C interface (no torch headers), compiled on first use. See `build`."""
