"""Figures and tables from event files."""
