"""Programs that show csdraft at work: not part of the wheel. Run from the repository's root, as `make demo` does."""
