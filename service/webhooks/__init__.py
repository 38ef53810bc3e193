"""Webhooks: a job's end is told to a URL of its client, signed, from a queue of our own."""
