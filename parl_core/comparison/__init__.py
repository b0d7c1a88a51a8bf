"""Several runs of several algorithms: doing them, their statistics, tables and curves."""
