"""Published results, computed again: `parl reproduce <study>`."""
