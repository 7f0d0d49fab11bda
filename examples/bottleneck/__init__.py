"""Scripts, not a package: pandas looks for an optional package of this name, and must not take this folder for it."""

raise ImportError(__doc__)
