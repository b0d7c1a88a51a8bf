"""Results that are kept: rows in CSVs, tables, and what they were computed with."""
