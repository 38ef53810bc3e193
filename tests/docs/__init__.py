"""The documents: what of them is made from the code, and how their commands and snippets are run.

`python -m tests.docs` renews what is made: docs/api.md and the tables of docs/operating.md. tests/test_docs.py fails
where it was not done, and runs every block of every page.
"""
