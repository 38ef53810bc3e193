"""The commands of `c2i`, a file a subject."""
