"""Counting what flows, and showing it."""
