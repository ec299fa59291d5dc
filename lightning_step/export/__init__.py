"""Verified sparse files, and back."""
