"""Kernel interfaces, one file each. Thin wrappers without policy; errno becomes OSError with the path."""
