"""Kills, stops and starves a real service at random moments, and looks whether it keeps its word.

`python -m tests.chaos --rounds N --seed S`. A round submits jobs, waits for one to be at work, strikes one blow
(`faults`), waits for everything to end, and then holds the service against what it promises (`invariants`).
"""
