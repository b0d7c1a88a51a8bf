"""The studies; `registry` knows their names."""
