"""Tabular bilevel problems, published and textbook ones; `envs.tabular` offers their names."""
