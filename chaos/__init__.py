"""Exactness under fire: faults while records flow, then a comparison with the log itself."""
