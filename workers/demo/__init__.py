"""`make demo`: a real model gets better at a real task, over HTTP, on one machine."""
