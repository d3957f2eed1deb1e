"""Measures of made videos."""
