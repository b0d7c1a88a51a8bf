"""Policies and reward models."""
