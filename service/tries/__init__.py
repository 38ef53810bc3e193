"""Prompts that the base and the adapted model of a finished job answer, side by side."""
