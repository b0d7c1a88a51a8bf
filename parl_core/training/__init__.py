"""The thin orchestrator: configurations, the bilevel loop, run folders, plots."""
